"""The methods of the gradient benchmark by name.

Every method gets the same buckets in the same order, may work on all of them at once, and is done when the average is
in the buffers.
"""

from __future__ import annotations

from thinwire.bench.gradients_exchange import Method
from thinwire.bench.gradients_ours import OURS
from thinwire.bench.gradients_peers import PEERS
from thinwire.errors import MisuseError

__all__ = ["METHODS", "choose"]

METHODS: dict[str, Method] = {method.name: method for method in (*PEERS, *OURS)}


def choose(names: str) -> list[Method]:
    """The methods of a comma-separated list; ``baselines``, ``ours`` and ``all`` stand for several.

    >>> [method.name for method in choose("noop,fp32")]
    ['noop', 'fp32']

    Raises:
        MisuseError: There is no such method.
    """
    groups = {
        "all": list(METHODS),
        "baselines": [name for name, method in METHODS.items() if not method.ours],
        "ours": [name for name, method in METHODS.items() if method.ours],
    }
    chosen = [each for name in names.split(",") for each in groups.get(name.strip(), [name.strip()])]
    unknown = [name for name in chosen if name not in METHODS]
    if unknown or not chosen:
        raise MisuseError(f"no method {', '.join(unknown) or names!r}; there are {', '.join((*groups, *METHODS))}")
    return [METHODS[name] for name in dict.fromkeys(chosen)]

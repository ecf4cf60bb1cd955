"""The merge methods, by name. A new one is a file here and its line in the table.

>>> sorted(METHODS)[:3], method_of("ties").source
(['breadcrumbs', 'breadcrumbs_ties', 'changed_mean'], 'arXiv:2306.01708')
>>> method_of("tise")
Traceback (most recent call last):
...
thinwire.errors.MisuseError: there is no merge method 'tise'; did you mean ties?
"""

from __future__ import annotations

import difflib

from thinwire.errors import MisuseError
from thinwire.merge.methods import arithmetic, breadcrumbs, dare, della, ram, sce, ties
from thinwire.merge.methods.base import Method

__all__ = ["METHODS", "method_of"]

METHODS: dict[str, Method] = {
    method.name: method
    for module in (arithmetic, ties, dare, della, breadcrumbs, sce, ram)
    for method in module.METHODS
}


def method_of(name: str) -> Method:
    """The method called ``name``.

    Raises:
        MisuseError: there is none; the nearest name is told.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}"
        raise MisuseError(f"there is no merge method {name!r}; {advice}", method=name)
    return METHODS[name]

"""From a word or a URL to a carrier. Each kind is imported only when it is asked for."""

from __future__ import annotations

import re

from thinwire.errors import MisuseError
from thinwire.peers.protocol import Carrier

__all__ = ["open_peers"]

KNOWN = "swarm, nixl, mooncake, each also as swarm://host:port; a process group is given as Collective(group)"
_SPEC = re.compile(r"(swarm|nixl|mooncake)(?:://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})/?)?", re.ASCII)


def open_peers(spec: str) -> Carrier:
    """The carrier that ``spec`` names: ``swarm``, ``nixl`` or ``mooncake``.

    The word alone: workers find one another through the publisher, and the publisher through the store. With
    ``://host:port`` they meet at a ``thinwire rendezvous`` that runs there.

    Raises:
        MisuseError: no such carrier.

    >>> open_peers("swarm").name, open_peers("swarm://tracker:6969").name
    ('swarm', 'swarm')
    >>> open_peers("pigeons")
    Traceback (most recent call last):
    thinwire.errors.MisuseError: no peers by the name of 'pigeons'; known: swarm, ...
    """
    found = _SPEC.fullmatch(spec) if isinstance(spec, str) else None
    if found is None or (found[3] and not 0 < int(found[3]) < 65536):
        raise MisuseError(f"no peers by the name of {spec!r}; known: {KNOWN}")
    rendezvous = f"{found[2]}:{found[3]}" if found[2] else None
    if found[1] == "swarm":
        from thinwire.peers.torrent import Swarm

        return Swarm(rendezvous=rendezvous)
    from thinwire.peers.rdma import Rdma

    return Rdma(found[1], rendezvous=rendezvous)

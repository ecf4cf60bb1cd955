"""Bytes straight from worker to worker: a swarm, a process group's broadcast, RDMA.

:func:`open_peers` makes a carrier from a word or a URL; :mod:`thinwire.peers.protocol` says what a carrier promises.
"""

from __future__ import annotations

from thinwire.peers.opening import open_peers
from thinwire.peers.protocol import Blob, Carrier, Joint, Origin

__all__ = ["Blob", "Carrier", "Joint", "Origin", "open_peers"]

"""Peers that are threads of one process: for tests, and for simulating more workers than a machine can hold."""

from __future__ import annotations

import random
import threading
from typing import final

from thinwire.errors import MalformedError, MisuseError
from thinwire.peers.protocol import Blob, Origin, Progress

__all__ = ["MemoryPeers", "Room"]


class Room:
    """Where the peers of one run meet."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.peers: list[MemoryPeers] = []


@final
class MemoryPeers:
    """A carrier between the members of a :class:`Room`.

    >>> from thinwire.stores.memory import MemoryStore
    >>> room, store = Room(), MemoryStore()
    >>> a, b = MemoryPeers(room), MemoryPeers(room)
    >>> a.join(store, publishing=True); b.join(store, publishing=False)
    >>> a.offer("objects/1/delta", [b"weights"])
    >>> b.fetch("objects/1/delta", size_max=7, stall_s=1.0, progress=print)
    7
    b'weights'
    """

    name = "memory"

    def __init__(self, room: Room) -> None:
        self._room = room
        self._held: dict[str, bytes] = {}
        self._got_from: dict[str, MemoryPeers] = {}
        self._avoided: set[tuple[str, int]] = set()
        self._joined = self._left = False
        self.sent_bytes = self.received_bytes = 0

    def join(self, origin: Origin, *, publishing: bool) -> None:
        if self._joined:
            raise MisuseError("these peers were joined to a run before; make new ones for another")
        self._joined = True
        with self._room.lock:
            self._room.peers.append(self)

    def meeting(self) -> bytes:
        return b"the room"

    def join_at(self, origin: Origin, meeting: bytes) -> None:
        if meeting != b"the room":
            raise MalformedError("no meeting of peers in memory")
        self.join(origin, publishing=True)

    def carries(self, key: str, size: int) -> bool:
        return True

    def offer(self, key: str, data: Blob) -> None:
        if not self._left:
            self._held[key] = b"".join(data)

    def fetch(self, key: str, *, size_max: int, stall_s: float, progress: Progress) -> bytes | None:
        with self._room.lock:
            if self._left:
                return None
            others = [p for p in self._room.peers if p is not self and (key, id(p)) not in self._avoided]
            having = [(p, data) for p in others if (data := p._held.get(key)) is not None and len(data) <= size_max]
            if not having:
                return None
            giver, data = random.choice(having)
            self._held[key], self._got_from[key] = data, giver
            giver.sent_bytes += len(data)
            self.received_bytes += len(data)
        progress(len(data))
        return data

    def distrust(self, key: str) -> None:
        with self._room.lock:
            self._held.pop(key, None)
            giver = self._got_from.pop(key, None)
            if giver is not None:
                self._avoided.add((key, id(giver)))

    def leave(self) -> None:
        with self._room.lock:
            self._left = True
            self._held.clear()
            if self in self._room.peers:
                self._room.peers.remove(self)

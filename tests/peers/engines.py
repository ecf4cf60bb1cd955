"""A transfer engine inside one process: reads are copies from the address that a ticket names."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from typing import Any

from thinwire.errors import RetryError
from thinwire.peers.rdma import Memory

_registered: dict[int, Memory] = {}
_lock = threading.Lock()


class Copying:
    """Engines of one process see one another's registered memory. ``fault`` goes wrong in a read."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.reads = 0

    def hold(self, memory: Memory) -> tuple[Any, dict[str, Any]]:
        with _lock:
            _registered[memory.address] = memory
        return memory, {"address": memory.address}

    def release(self, registration: Any) -> None:
        with _lock:
            _registered.pop(registration.address, None)

    def read(
        self, ticket: Mapping[str, Any], memory: Memory, *, progress: Callable[[int], object], stall_s: float
    ) -> None:
        self.reads += 1
        with _lock:
            theirs = _registered.get(ticket["address"])
            if theirs is None or len(theirs) < len(memory):
                raise RetryError("nothing is registered there")
            ctypes.memmove(memory.address, theirs.address, len(memory))
        if self.fault == "fails":
            raise RetryError("planned: the transfer failed")
        if self.fault == "lies":
            memory.data[len(memory) // 2] ^= 1
        progress(len(memory))

    def close(self) -> None:
        pass

"""Mooncake's transfer engine: RDMA or TCP, without a metadata server of its own (its peer-to-peer handshake)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, final

from thinwire.errors import MalformedError, MisuseError, RetryError
from thinwire.peers.rdma import Memory
from thinwire.peers.rendezvous import here, split_address

__all__ = ["Mooncake", "need"]

_CHUNK_BYTES = 32 << 20


def need() -> None:
    """Raises MisuseError where Mooncake is not installed."""
    try:
        import mooncake.engine  # noqa: F401
    except ImportError as error:
        raise MisuseError("peers by Mooncake need its package: pip install 'thinwire[mooncake]'") from error


@final
class Mooncake:
    """A transfer engine. ``host``: this machine's address for others; ``protocol``: ``tcp`` or ``rdma``; ``device``:
    names of RDMA devices, all by default."""

    def __init__(self, host: str | None = None, protocol: str = "tcp", device: str = "") -> None:
        need()
        from mooncake.engine import TransferEngine

        if protocol not in ("tcp", "rdma"):
            raise MisuseError(f"Mooncake's protocol is tcp or rdma, not {protocol!r}")
        self._host = host or here()[0]
        self._lock = threading.Lock()
        self._engine = TransferEngine()
        if self._engine.initialize(self._host, "P2PHANDSHAKE", protocol, device) != 0:
            raise RetryError(f"Mooncake did not start with {protocol} on {self._host}")

    def hold(self, memory: Memory) -> tuple[Any, dict[str, Any]]:
        if self._engine.register_memory(memory.address, len(memory)) != 0:
            raise RetryError(f"Mooncake cannot register {len(memory)} bytes")
        session = f"{self._host}:{self._engine.get_rpc_port()}"
        return memory, {"address": memory.address, "session": session}

    def release(self, registration: Any) -> None:
        self._engine.unregister_memory(registration.address)

    def read(
        self, ticket: Mapping[str, Any], memory: Memory, *, progress: Callable[[int], object], stall_s: float
    ) -> None:
        """Fill ``memory``. A part on its way cannot be broken off, so ``stall_s`` is looked at after each of 32 MiB."""
        address, session = ticket.get("address"), ticket.get("session")
        try:
            split_address(session if isinstance(session, str) else "")
        except MalformedError as error:
            raise RetryError(f"a ticket of Mooncake's without a session: {error}") from error
        if type(address) is not int or not 0 < address < 1 << 63:
            raise RetryError("a ticket of Mooncake's without an address")
        if self._engine.register_memory(memory.address, len(memory)) != 0:
            raise RetryError(f"Mooncake cannot register {len(memory)} bytes")
        deadline = time.monotonic() + stall_s
        try:
            for start in range(0, len(memory), _CHUNK_BYTES):
                size = min(_CHUNK_BYTES, len(memory) - start)
                here_, there = memory.address + start, address + start
                if self._engine.transfer_sync_read(session, here_, there, size) != 0:
                    raise RetryError(f"Mooncake did not read {size} bytes from {session}")
                progress(start + size)
                if time.monotonic() > deadline:
                    raise RetryError(f"Mooncake took over {stall_s:g} s for {size} bytes from {session}")
                deadline = time.monotonic() + stall_s
        finally:
            self._engine.unregister_memory(memory.address)

    def close(self) -> None:
        """Mooncake's engine ends with its last reference."""
        with self._lock:
            self._engine = None

"""Reads from another worker's memory: RDMA where there is a network for it, else TCP or shared memory.

Who holds an object registers its memory with a transfer engine (NIXL or Mooncake) and leaves a ticket at the
rendezvous: which machine, which address, how many bytes. A reader takes one of the tickets and reads, without the
holder's processor having a part in it where the network can do that. What was read is offered on, so that the publisher
is not everybody's source.

A ticket leads into native code, so it must bear a code that only who may read the store can make: the publisher writes
the key for it beside its rendezvous' address.
"""

from __future__ import annotations

import ctypes
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, final

from thinwire.errors import MalformedError, MisuseError, RefetchError, RetryError
from thinwire.peers.protocol import Blob, Origin, Progress
from thinwire.peers.rendezvous import (
    HINT_BYTES_MAX,
    HINT_KEY,
    Hint,
    Rendezvous,
    Tickets,
    addresses_of,
    hint_bytes,
    parse_hint,
)

__all__ = ["Engine", "Memory", "Rdma"]

_log = logging.getLogger(__name__)
_HINT_S = 10.0
_REFUSED_MAX, _LIES = 4096, 3
_OPTIONS = {"nixl": {"backends"}, "mooncake": {"host", "protocol", "device"}}


class Memory:
    """Bytes at a fixed address."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self._pin = (ctypes.c_char * size).from_buffer(self.data)  # as long as this lives, nothing moves
        self.address = ctypes.addressof(self._pin)

    @classmethod
    def of(cls, data: Blob) -> Memory:
        """A copy of an object's bytes."""
        made = cls(sum(memoryview(buffer).nbytes for buffer in data))
        at = 0
        for buffer in data:
            view = memoryview(buffer).cast("B")
            made.data[at : at + len(view)] = view
            at += len(view)
        return made

    def __len__(self) -> int:
        return len(self.data)


class Engine(Protocol):
    """A transfer engine. Safe to use from several threads."""

    def hold(self, memory: Memory) -> tuple[Any, dict[str, Any]]:
        """Let others read ``memory``: what to release later, and what they must know, as JSON can hold it.

        Raises:
            RetryError: the engine refused.
        """
        ...

    def release(self, registration: Any) -> None:
        """Nobody reads that memory any more."""
        ...

    def read(
        self, ticket: Mapping[str, Any], memory: Memory, *, progress: Callable[[int], object], stall_s: float
    ) -> None:
        """Fill ``memory`` from where the ticket leads.

        Raises:
            RetryError: it leads nowhere, or nothing came for ``stall_s``.
        """
        ...

    def close(self) -> None: ...


def _engine(name: str, options: Mapping[str, Any]) -> Engine:
    if name == "nixl":
        from thinwire.peers.rdma_nixl import Nixl

        return Nixl(**options)
    from thinwire.peers.rdma_mooncake import Mooncake

    return Mooncake(**options)


def _need(name: str) -> None:
    """Raises MisuseError where the engine's package is missing."""
    if name == "nixl":
        from thinwire.peers.rdma_nixl import need
    else:
        from thinwire.peers.rdma_mooncake import need
    need()


class _Held:
    def __init__(self, memory: Memory, registration: Any) -> None:
        self.memory, self.registration = memory, registration


@final
class Rdma:
    """A carrier by reads from memory.

    Args:
        engine: ``nixl`` or ``mooncake``, or an :class:`Engine` of your own.
        rendezvous: ``host:port`` of a ``thinwire rendezvous``; by default the publisher's own, which consumers find by
            a hint in the store.
        keep_bytes: of objects held for others; those first given up that are the oldest.
        relay: offer on what was read.
        bytes_min: smaller objects come from the store.
        rendezvous_port: of a publisher's own rendezvous; 0 is a free one.
        options: of the engine: ``backends`` (NIXL: ``["UCX"]``); ``host``, ``protocol`` (``tcp``, ``rdma``) and
            ``device`` (Mooncake).

    Raises:
        MisuseError: no such engine or option; (:meth:`join`) its package is missing.
    """

    def __init__(
        self,
        engine: str | Engine = "nixl",
        *,
        rendezvous: str | None = None,
        keep_bytes: int = 8 << 30,
        relay: bool = True,
        bytes_min: int = 64 << 10,
        rendezvous_port: int = 0,
        **options: Any,
    ) -> None:
        self.name = engine if isinstance(engine, str) else type(engine).__name__.lower()
        known = _OPTIONS.get(self.name, set()) if isinstance(engine, str) else set()
        if isinstance(engine, str) and engine not in _OPTIONS:
            raise MisuseError(f"no transfer engine by the name of {engine!r}; known: {', '.join(_OPTIONS)}")
        if not set(options) <= known or keep_bytes < 1 or bytes_min < 1:
            raise MisuseError(
                f"options of {self.name} are {', '.join(sorted(known)) or 'none'}; keep_bytes and bytes_min are above 0"
            )
        self._named = None if rendezvous is None else addresses_of(rendezvous)
        self._options, self._keep_bytes, self._relay, self._bytes_min = options, keep_bytes, relay, bytes_min
        self._rendezvous_port = rendezvous_port
        self._origin: Origin | None = None
        self._publishing = self._left = self._hinted = False
        self._rendezvous: Rendezvous | None = None
        self._secret = secrets.token_bytes(32)
        self._holder = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._engine: Engine | None = None if isinstance(engine, str) else engine
        self._given = self._engine is not None
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._came_from: dict[str, str] = {}
        self._avoided: OrderedDict[str, set[str]] = OrderedDict()  # holders, and the keys that they were wrong about
        self._hint: tuple[float, Hint | None] = (float("-inf"), None)
        self.read_bytes = 0

    def join(self, origin: Origin, *, publishing: bool) -> None:
        if self._origin is not None:
            raise MisuseError("this carrier was joined to a run before; make a new one for another")
        if not self._given:
            _need(self.name)
        self._origin, self._publishing = origin, publishing
        if publishing and self._named is None:
            self._rendezvous = Rendezvous(port=self._rendezvous_port)

    def meeting(self) -> bytes:
        return hint_bytes(self._addresses(), self._secret)

    def join_at(self, origin: Origin, meeting: bytes) -> None:
        hint = parse_hint(meeting)
        self._named, self._secret = self._named or hint.addresses, hint.secret
        self.join(origin, publishing=True)

    def carries(self, key: str, size: int) -> bool:
        return size >= self._bytes_min and len(key) <= 512

    def _started(self) -> Engine:
        with self._lock:
            if self._left:
                raise RetryError("this carrier was left")
            if self._engine is None:
                self._engine = _engine(self.name, self._options)
            return self._engine

    # --- the rendezvous ----------------------------------------------------------------------------------------------

    def _addresses(self) -> list[str]:
        """Of a publisher's rendezvous."""
        return self._named or [] if self._rendezvous is None else self._rendezvous.addresses

    def _tickets(self) -> Tickets | None:
        """The rendezvous' tickets; None while nobody has said where it is."""
        if self._publishing:
            return Tickets(self._addresses(), holder=self._holder, secret=self._secret)
        hint = self._hinted_at()
        if hint is None:
            return None
        return Tickets(self._named or hint.addresses, holder=self._holder, secret=hint.secret)

    def _hinted_at(self) -> Hint | None:
        at, known = self._hint
        if time.monotonic() - at < _HINT_S or self._origin is None:
            return known
        try:
            known = parse_hint(self._origin.get(HINT_KEY, size_max=HINT_BYTES_MAX))
        except (RefetchError, MalformedError) as error:
            _log.info("no publisher tells where its peers meet: %s", error)
        self._hint = time.monotonic(), known
        return known

    def _tell(self) -> None:
        if self._publishing and not self._hinted and self._origin is not None:
            self._origin.put(HINT_KEY, [self.meeting()])
            self._hinted = True

    # --- giving ------------------------------------------------------------------------------------------------------

    def offer(self, key: str, data: Blob) -> None:
        size = sum(memoryview(buffer).nbytes for buffer in data)
        if self._left or self._origin is None or key in self._held or not self.carries(key, size):
            return
        if (self._publishing or self._relay) and size <= self._keep_bytes:
            self._tell()
            self._hold(key, Memory.of(data))

    def _hold(self, key: str, memory: Memory) -> None:
        tickets = self._tickets()
        if tickets is None:
            return
        engine = self._started()
        registration, ticket = engine.hold(memory)
        with self._lock:
            if self._left or key in self._held:
                engine.release(registration)
                return
            self._held[key] = _Held(memory, registration)
        tickets.put(key, {**ticket, "engine": self.name, "size": len(memory)})
        self._trim(tickets)

    def _trim(self, tickets: Tickets) -> None:
        while True:
            with self._lock:
                held = sum(len(each.memory) for each in self._held.values())
                oldest = next(iter(self._held), None)
            if oldest is None or held <= self._keep_bytes:
                return
            self._release(oldest, tickets)

    def _release(self, key: str, tickets: Tickets | None) -> None:
        with self._lock:
            held = self._held.pop(key, None)
        if held is None:
            return
        if tickets is not None:
            with suppress(RetryError):
                tickets.put(key, None)
        if self._engine is not None:
            self._engine.release(held.registration)

    # --- taking ------------------------------------------------------------------------------------------------------

    def fetch(self, key: str, *, size_max: int, stall_s: float, progress: Progress) -> bytes | None:
        if self._left or self._origin is None:
            return None
        held = self._held.get(key)
        if held is not None and len(held.memory) <= size_max:
            return bytes(held.memory.data)
        tickets = self._tickets()
        failed: RetryError | None = None
        for ticket in self._usable(key, tickets.get(key), size_max) if tickets is not None else []:
            memory = Memory(ticket["size"])
            try:
                self._started().read(ticket, memory, progress=progress, stall_s=stall_s)
            except RetryError as error:
                failed = error
                continue
            with self._lock:
                self.read_bytes += len(memory)
                self._came_from[key] = ticket["holder"]
            if self._relay and len(memory) <= self._keep_bytes:
                threading.Thread(target=self._give_on, args=(key, memory), name="thinwire-relay", daemon=True).start()
            return bytes(memory.data)
        if failed is not None:
            raise failed
        return None

    def _usable(self, key: str, tickets: Sequence[dict[str, Any]], size_max: int) -> list[dict[str, Any]]:
        def is_avoided(holder: str) -> bool:
            wrong = self._avoided.get(holder, set())
            return key in wrong or len(wrong) >= _LIES

        return [
            ticket
            for ticket in tickets
            if ticket.get("engine") == self.name
            and type(ticket.get("size")) is int
            and 0 < ticket["size"] <= size_max
            and isinstance(ticket.get("holder"), str)
            and not is_avoided(ticket["holder"])
        ]

    def _give_on(self, key: str, memory: Memory) -> None:
        try:
            self._hold(key, memory)
        except Exception as error:  # nobody waits for this thread
            _log.info("%s is not given on: %s", key, error)

    def distrust(self, key: str) -> None:
        with self._lock:
            holder = self._came_from.pop(key, None)
            if holder is not None:
                self._avoided.setdefault(holder, set()).add(key)
                while len(self._avoided) > _REFUSED_MAX:
                    self._avoided.popitem(last=False)
        tickets = None
        if key in self._held:
            with suppress(RetryError):
                tickets = self._tickets()
        self._release(key, tickets)

    def leave(self) -> None:
        with self._lock:
            already, self._left = self._left, True
        if already:
            return
        tickets = None
        if not self._publishing and self._held:
            with suppress(RetryError):
                tickets = self._tickets()
        for key in list(self._held):
            self._release(key, tickets)
        if self._rendezvous is not None:
            self._rendezvous.close()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

"""A store that fails where a test says, and remembers what was asked of it.

>>> from thinwire.stores.memory import MemoryStore
>>> inner = MemoryStore()
>>> store = FaultyStore(inner, [Fault("create", 2, "lost-reply"), Fault("get", 1, "unavailable", times=2)])
>>> store.create("a", [b"first"])
>>> store.create("b", [b"second"])
Traceback (most recent call last):
thinwire.errors.StoreUnavailableError: planned: no reply to create of b
>>> inner.get("b", size_max=6)  # it was written all the same
b'second'
>>> for _ in range(3):
...     try:
...         print(store.get("a", size_max=5))
...     except StoreUnavailableError as error:
...         print(error)
planned: get of a not answered
planned: get of a not answered
b'first'
>>> [(operation.verb, operation.key, operation.fault) for operation in store.log][:3]
[('create', 'a', None), ('create', 'b', 'lost-reply'), ('get', 'a', 'unavailable')]

A process that dies between two writes is a plan, too; whatever it does afterwards does not reach the store:

>>> store = FaultyStore(inner, [Fault("write", 2, "crash-before")])
>>> try:
...     store.put("c", [b"written"])
...     store.put("d", [b"not written"])
... except SimulatedCrash:
...     print([info.key for info in inner.list("")])
['a', 'b', 'c']
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, final

from thinwire.errors import MisuseError, ObjectNotFoundError, StoreUnavailableError, ThinwireError
from thinwire.stores.checks import views
from thinwire.stores.protocol import Blob, ObjectInfo, Store

__all__ = ["Fault", "FaultyStore", "Kind", "Operation", "Plan", "SimulatedCrash", "Verb"]

Verb = Literal["get", "get_range", "put", "create", "head", "list", "delete"]

Group = Literal["any", "read", "write"]
"""``write`` is put, create and delete; ``read`` the other four."""

Kind = Literal["unavailable", "lost-reply", "missing", "short", "flip", "swap", "stale", "crash-before", "crash-after"]
"""What goes wrong:

- ``unavailable``: nothing is done, StoreUnavailableError (a throttled or refused request; with ``times`` several);
- ``lost-reply``: it is done, StoreUnavailableError all the same;
- ``missing``: ObjectNotFoundError, though the object may be there (a replica that lags);
- ``short``: get and get_range return the first half of the bytes;
- ``flip``: get and get_range return bytes with one bit changed in the middle;
- ``swap``: get and get_range return those of another object, the next in the order of keys;
- ``stale``: list shows the store as it was before the last ``stale_writes`` writes made through this wrapper;
- ``crash-before``, ``crash-after``: SimulatedCrash before or after it is done, and for everything later.
"""

_WRITES = {"put", "create", "delete"}
_BYTES_FAULTS = {"short", "flip", "swap"}

T = TypeVar("T")


class SimulatedCrash(BaseException):
    """The process is dead. Not an Exception: no handler that means to carry on may catch it."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call: how many came before it (``index``), what it was, its number among those of its verb (from 1), and
    the fault it met."""

    index: int
    verb: Verb
    key: str
    nth: int
    fault: Kind | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """The ``nth`` call (from 1) of ``verb``, and the ``times - 1`` after it, go wrong in the way ``kind`` says.

    Counted are the calls of this verb or group of verbs whose key (or prefix, for list) begins with ``key``.
    """

    verb: Verb | Group
    nth: int
    kind: Kind
    times: int = 1
    key: str = ""

    def covers(self, verb: Verb, key: str) -> bool:
        """Whether a call counts for this fault."""
        group = "write" if verb in _WRITES else "read"
        return self.verb in {"any", group, verb} and key.startswith(self.key)


Plan = Sequence[Fault] | Callable[[Operation], Kind | None]
"""Faults, the first fitting one of which wins, or a rule that is asked at every operation."""


@final
class FaultyStore:
    """``inner``, with the faults of a plan, latency and limited bandwidth.

    Args:
        inner: the store that does the work.
        plan: what goes wrong, see :data:`Plan`.
        latency_s: added to every operation.
        bandwidth: bytes a second of get, get_range, put and create together; None does not limit.
        stale_writes: how many of the latest writes a stale listing does not show.
        sleep: waits for latency and bandwidth; give a function that adds up instead to test without waiting.

    ``log`` holds every operation, in order. Safe to use from several threads; which of two calls made at the same
    time comes first is then up to them.
    """

    def __init__(
        self,
        inner: Store,
        plan: Plan = (),
        *,
        latency_s: float = 0.0,
        bandwidth: float | None = None,
        stale_writes: int = 1,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.inner = inner
        self.log: list[Operation] = []
        self.crashed = False
        self._plan = plan
        self._latency_s = latency_s
        self._bandwidth = bandwidth
        self._stale_writes = stale_writes
        self._sleep = sleep
        self._calls: Counter[Verb] = Counter()
        self._covered: Counter[Fault] = Counter()
        self._undo: list[tuple[str, ObjectInfo | None]] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def create_is_atomic(self) -> bool:
        return bool(getattr(self.inner, "create_is_atomic", True))

    def count(self, verb: Verb | Group = "any") -> int:
        """How many operations of this verb or group there were; to try a crash at each of them in turn."""
        any_key = Fault(verb, 1, "unavailable")
        return sum(any_key.covers(operation.verb, operation.key) for operation in self.log)

    def get(self, key: str, *, size_max: int) -> bytes:
        return self._read("get", key, lambda other: self.inner.get(other, size_max=size_max))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._read("get_range", key, lambda other: self.inner.get_range(other, start, length))

    def put(self, key: str, data: Blob) -> None:
        self._write("put", key, lambda: self.inner.put(key, data), size=sum(map(len, views(data))))

    def create(self, key: str, data: Blob) -> None:
        self._write("create", key, lambda: self.inner.create(key, data), size=sum(map(len, views(data))))

    def head(self, key: str) -> ObjectInfo:
        return self._perform("head", key, lambda _: self.inner.head(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        def found(fault: Kind | None) -> Iterator[ObjectInfo]:
            now = self.inner.list(prefix, start_after=start_after)
            return self._before_the_last_writes(prefix, start_after, now) if fault == "stale" else now

        return self._perform("list", prefix, found)

    def delete(self, key: str) -> None:
        self._write("delete", key, lambda: self.inner.delete(key))

    # --- the course of one operation ---------------------------------------------------------------------------------

    def _perform(self, verb: Verb, key: str, work: Callable[[Kind | None], T]) -> T:
        fault = self._begin(verb, key)
        try:
            result = work(fault)
        except ThinwireError:
            _lose(verb, key, fault)  # a refusal is a reply, too
            raise
        _lose(verb, key, fault)
        return result

    def _begin(self, verb: Verb, key: str) -> Kind | None:
        """Count and log the operation; fail if it is to fail before it is done."""
        with self._lock:
            if self.crashed:
                raise SimulatedCrash(f"{verb} of {key} after the crash")
            self._calls[verb] += 1
            operation = Operation(len(self.log), verb, key, self._calls[verb])
            fault = self._plan(operation) if callable(self._plan) else self._planned(self._plan, verb, key)
            self.log.append(replace(operation, fault=fault))
            self.crashed = fault in {"crash-before", "crash-after"}
        if (fault in _BYTES_FAULTS and verb not in {"get", "get_range"}) or (fault == "stale" and verb != "list"):
            raise MisuseError(f"a plan asks for {fault!r} at {verb}, which returns no such thing")
        if fault == "crash-before":
            raise SimulatedCrash(f"before {verb} of {key}")
        if self._latency_s:
            self._sleep(self._latency_s)
        if fault == "unavailable":
            raise StoreUnavailableError(f"planned: {verb} of {key} not answered", key=key)
        if fault == "missing":
            raise ObjectNotFoundError(f"planned: {verb} does not find {key}", key=key)
        return fault

    def _planned(self, plan: Sequence[Fault], verb: Verb, key: str) -> Kind | None:
        """The first fault that is due. Every fault counts every call it covers, also where an earlier one wins."""
        due: Kind | None = None
        for fault in plan:
            if fault.covers(verb, key):
                self._covered[fault] += 1
                if due is None and fault.nth <= self._covered[fault] < fault.nth + fault.times:
                    due = fault.kind
        return due

    def _read(self, verb: Verb, key: str, read: Callable[[str], bytes]) -> bytes:
        def work(fault: Kind | None) -> bytes:
            data = read(self._other(key) if fault == "swap" else key)
            self._transfer(len(data))
            if fault == "short":
                return data[: len(data) // 2]
            if fault == "flip" and data:
                middle = len(data) // 2
                return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            return data

        return self._perform(verb, key, work)

    def _write(self, verb: Verb, key: str, write: Callable[[], None], size: int = 0) -> None:
        def work(_: Kind | None) -> None:
            self._transfer(size)
            try:
                before: ObjectInfo | None = self.inner.head(key)
            except ObjectNotFoundError:
                before = None
            write()
            with self._lock:
                self._undo.append((key, before))

        self._perform(verb, key, work)

    def _transfer(self, size: int) -> None:
        if self._bandwidth is not None:
            self._sleep(size / self._bandwidth)

    # --- what a broken store would return ----------------------------------------------------------------------------

    def _other(self, key: str) -> str:
        keys = [info.key for info in self.inner.list("") if info.key != key]
        if not keys:
            raise MisuseError(f"a plan swaps {key} for another object, but there is none")
        return next((other for other in keys if other > key), keys[0])

    def _before_the_last_writes(self, prefix: str, start_after: str, now: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        infos = {info.key: info for info in now}
        with self._lock:
            undone = self._undo[max(0, len(self._undo) - self._stale_writes) :]
        for key, before in reversed(undone):
            infos.pop(key, None)
            if before is not None and key.startswith(prefix) and key > start_after:
                infos[key] = before
        return iter([infos[key] for key in sorted(infos)])

    def __repr__(self) -> str:
        return f"FaultyStore({self.inner!r})"


def _lose(verb: Verb, key: str, fault: Kind | None) -> None:
    """What happens between the store's reply and its arrival."""
    if fault == "crash-after":
        raise SimulatedCrash(f"after {verb} of {key}")
    if fault == "lost-reply":
        raise StoreUnavailableError(f"planned: no reply to {verb} of {key}", key=key)

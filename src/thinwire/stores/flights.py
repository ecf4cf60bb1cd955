"""Work that several threads want done at the same time, done once: single flight, and one look for many that wait."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar, final

__all__ = ["Flights", "Lookout"]

T = TypeVar("T")


class _Flight(Generic[T]):
    """One call under way; ``result`` or ``error`` is set before ``done``."""

    __slots__ = ("done", "error", "result")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: T | None = None
        self.error: BaseException | None = None


@final
class Flights(Generic[T]):
    """Calls by name, of which one at a time is made; who asks meanwhile gets what it gets, or raises what it raises.

    >>> Flights[int]().run("a", lambda: 1)
    1
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[Hashable, _Flight[T]] = {}

    def run(self, name: Hashable, work: Callable[[], T]) -> T:
        """What ``work()`` returns here, or where it is under way."""
        while True:
            with self._lock:
                flight = self._under_way.get(name)
                mine = flight is None
                if flight is None:
                    flight = self._under_way[name] = _Flight()
            if mine:
                return self._fly(name, flight, work)
            flight.done.wait()
            if flight.error is None:
                return flight.result  # type: ignore[return-value]
            if isinstance(flight.error, Exception):  # a copy: two threads must not write one traceback
                raise copy.copy(flight.error) from flight.error
            # else its thread was interrupted, which is not our affair: again

    def _fly(self, name: Hashable, flight: _Flight[T], work: Callable[[], T]) -> T:
        try:
            flight.result = work()
            return flight.result
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                if self._under_way.get(name) is flight:
                    del self._under_way[name]
            flight.done.set()

    def forget(self, matching: Callable[[Hashable], bool]) -> None:
        """Who asks from now on does not get what is under way for these names: it may be of before a write."""
        with self._lock:
            for name in [name for name in self._under_way if matching(name)]:
                del self._under_way[name]


@final
class Lookout:
    """One thread that looks for what any number of threads wait for; it is there while somebody waits.

    ``seen(name)`` is asked every ``every_s`` for each name that is waited for.
    """

    def __init__(self, seen: Callable[[str], bool], *, every_s: float) -> None:
        self._seen, self._every_s = seen, every_s
        self._lock = threading.Lock()
        self._waited: dict[str, tuple[threading.Event, int]] = {}
        self._running = False

    def wait(self, name: str, *, timeout_s: float) -> bool:
        """Whether it was seen within ``timeout_s``."""
        if self._seen(name):
            return True
        if timeout_s <= 0:
            return False
        with self._lock:
            event, count = self._waited.get(name, (threading.Event(), 0))
            self._waited[name] = event, count + 1
            if not self._running:
                self._running = True
                threading.Thread(target=self._look, name="thinwire lookout", daemon=True).start()
        try:
            return event.wait(timeout_s)
        finally:
            with self._lock:
                held, count = self._waited.get(name, (event, 0))
                if held is event and count > 1:
                    self._waited[name] = event, count - 1
                elif held is event:
                    self._waited.pop(name, None)

    def _look(self) -> None:
        while True:
            time.sleep(self._every_s)
            with self._lock:
                names = list(self._waited)
                if not names:
                    self._running = False
                    return
            for name in names:
                if self._seen(name):
                    with self._lock:
                        found = self._waited.pop(name, None)
                    if found is not None:
                        found[0].set()

"""Ranks as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from thinwire.errors import RetryError

T = TypeVar("T")


class _Room:
    def __init__(self, size: int, timeout_s: float) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout_s)


class ThreadRanks:
    """One of several threads that gather."""

    def __init__(self, rank: int, size: int, room: _Room) -> None:
        self.rank, self.size, self._room = rank, size, room

    def gather(self, value: Any) -> list[Any]:
        try:
            self._room.values[self.rank] = value
            self._room.barrier.wait()
            found = list(self._room.values)
            self._room.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise RetryError("a rank does not answer") from error
        return found


def ranks(size: int, timeout_s: float = 60.0) -> list[ThreadRanks]:
    room = _Room(size, timeout_s)
    return [ThreadRanks(rank, size, room) for rank in range(size)]


def together(works: list[Callable[[], T]]) -> list[T]:
    """What each returns, run at the same time; the first error of any."""
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(work) for work in works]
    return [future.result() for future in futures]

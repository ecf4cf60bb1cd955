"""Ranks as threads, for tests of what they do together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from thinwire.compress.group import MemoryGroup

T = TypeVar("T")


def together(size: int, work: Callable[[MemoryGroup], T], timeout_s: float = 30.0) -> list[T]:
    """What ``work`` returns on each of ``size`` ranks, run at the same time."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, MemoryGroup.of(size, timeout_s)))

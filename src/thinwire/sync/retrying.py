"""Waiting: retries with exponential back-off and jitter, and time limits, on the monotonic clock."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from thinwire.errors import RetryError

__all__ = ["jittered", "retrying"]

T = TypeVar("T")


def jittered(seconds: float) -> float:
    """A random time between half and one and a half times ``seconds``, so that many clients do not ask at once."""
    return seconds * random.uniform(0.5, 1.5)


def retrying(call: Callable[[], T], *, limit_s: float, first_wait_s: float = 0.1) -> T:
    """``call()``, again after a pause while it raises :class:`~thinwire.errors.RetryError`, for up to ``limit_s``.

    Raises:
        RetryError: the last one, when the time is used up.
    """
    deadline = time.monotonic() + limit_s
    pause = first_wait_s
    while True:
        try:
            return call()
        except RetryError:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            time.sleep(min(jittered(pause), left))
            pause = min(2 * pause, 10.0)

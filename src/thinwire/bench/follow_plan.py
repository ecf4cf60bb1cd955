"""Who is killed and who joins at which version: drawn from a seed, so that a failing run can be had again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from thinwire.errors import MisuseError

__all__ = ["Event", "plan_events"]

KILL_SPREAD_S = 0.06  # about as long as a version takes to be fetched, applied and hashed


@dataclass(frozen=True, slots=True)
class Event:
    """``consumer`` is killed, or a process for it started, ``delay_s`` after ``version`` was published."""

    version: int
    consumer: int
    kind: Literal["kill", "join"]
    delay_s: float


def plan_events(versions: int, consumers: int, kills: int, seed: int) -> Mapping[int, Sequence[Event]]:
    """Events by version.

    The first consumer is there from the first version on, the others join late. Each kill is followed by a join of the
    same consumer a few versions later, and all consumers are there before the last tenth of the versions.

    >>> events = plan_events(40, 3, 2, seed=0)
    >>> sorted(e.kind for some in events.values() for e in some)
    ['join', 'join', 'join', 'join', 'join', 'kill', 'kill']
    """
    if versions < 10 or consumers < 1 or kills < 0:
        raise MisuseError("a run needs 10 versions and a consumer")
    draw = random.Random(seed)
    last = max(versions * 9 // 10, 2)
    free = []  # the version from which each consumer may be killed
    found: list[Event] = []
    for consumer in range(consumers):
        at = 1 if consumer == 0 else draw.randint(2, max(versions // 4, 2))
        found.append(Event(at, consumer, "join", 0.0))
        free.append(at + 1)
    gap = max(last // (2 * max(kills, 1)), 1)  # versions for which a consumer stays dead, at most
    for _ in range(kills):
        consumer = min(range(consumers), key=lambda c: free[c] + draw.random())
        room = last - 1 - free[consumer]
        if room < 1:
            raise MisuseError(f"{kills} kills of {consumers} consumers do not fit into {versions} versions")
        at = free[consumer] + draw.randint(0, min(room - 1, max(last * consumers // (kills + consumers) - gap, 0)))
        back = min(at + draw.randint(1, gap), last)
        found.append(Event(at, consumer, "kill", draw.uniform(0, KILL_SPREAD_S)))
        found.append(Event(back, consumer, "join", 0.0))
        free[consumer] = back + 1
    by_version: dict[int, list[Event]] = {}
    for event in found:
        by_version.setdefault(event.version, []).append(event)
    return by_version

"""How much to send in which round, and who: a schedule, a budget of bytes, and clients' bandwidths.

Schedules are those of :mod:`thinwire.compress.schedule` (a round is a step). What is added here fits federations:
losses are noisy and rounds few, so a plateau is a number of rounds without a new best rather than a window's mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import final

from thinwire.compress.base import State, check_density
from thinwire.compress.schedule import Schedule, Signals
from thinwire.errors import MisuseError

__all__ = ["Adaptive", "Bandwidths", "affordable"]


@final
@dataclass(frozen=True)
class Adaptive(Schedule):
    """Raises the density where the loss stands still, lowers it where the loss diverges.

    After ``patience`` rounds in which the loss did not fall by a share of ``improvement`` below its best, the density
    is multiplied by ``factor``: what is held back may be the reason. A loss that is not finite, or above ``divergence``
    times the best, divides it: large sparse steps of stale residuals may be the reason, and bytes spent on them are
    wasted. The count begins anew after either.

    >>> schedule = Adaptive(start=0.01, patience=2)
    >>> state, densities = schedule.init(), []
    >>> for step, loss in enumerate([1.0, 0.5, 0.5, 0.5, 2.0]):
    ...     state = schedule.observe(state, Signals(step, loss=loss))
    ...     densities.append(schedule.density(state))
    >>> densities
    [0.01, 0.01, 0.01, 0.02, 0.01]

    Raises:
        MisuseError: The bounds are not ordered ``0 < minimum <= start <= maximum <= 1``, or another number makes no
            sense.
    """

    start: float = 0.01
    minimum: float = 0.001
    maximum: float = 0.1
    patience: int = 3
    factor: float = 2.0
    improvement: float = 0.01
    divergence: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.start <= self.maximum <= 1:
            raise MisuseError(f"densities {self.minimum}, {self.start}, {self.maximum}; give them in order, in (0, 1]")
        if self.patience < 1 or not 1 < self.factor < inf or not 0 <= self.improvement < 1 or not self.divergence > 1:
            raise MisuseError("give patience >= 1, factor > 1, improvement in [0, 1) and divergence > 1")

    def init(self) -> State:
        return {"density": self.start, "best": inf, "waited": 0}

    def observe(self, state: State, signals: Signals) -> State:
        loss = signals.loss
        if loss is None:
            return state
        best, density, waited = state["best"], state["density"], state["waited"]
        if not isfinite(loss) or (best > 0 and loss > self.divergence * best):
            return {**state, "density": max(self.minimum, density / self.factor), "waited": 0}
        if loss < best - self.improvement * abs(best) or not isfinite(best):
            return {**state, "best": loss, "waited": 0}
        waited += 1
        if waited >= self.patience:
            density, waited = min(self.maximum, density * self.factor), 0
        return {"density": density, "best": min(best, loss), "waited": waited}

    def density(self, state: State) -> float:
        return float(state["density"])


def affordable(
    bytes_left: float, rounds_left: int, *, clients: int, numel: int, fixed: float, per_entry: float
) -> float:
    """The up-link density at which each of the rounds that are left costs no more than its share.

    ``fixed`` is what a client's round costs besides its update's entries (headers, the down-link), ``per_entry`` what
    an entry takes, both in bytes. Where not even one entry is left, it is one entry: the round is not skipped.

    >>> affordable(10_000, 10, clients=2, numel=10_000, fixed=200, per_entry=3.0)
    0.01
    """
    if rounds_left < 1 or clients < 1 or numel < 1:
        return 1 / max(1, numel)
    share = bytes_left / rounds_left / clients - fixed
    return min(1.0, max(1 / numel, share / per_entry / numel))


@final
@dataclass(frozen=True)
class Bandwidths:
    """A density for each client, so that its update takes at most ``seconds`` at its bandwidth.

    ``bytes_per_second`` maps clients' ids; those it lacks are not limited.

    >>> limits = Bandwidths({7: 1000.0}, seconds=3.0)
    >>> limits.density(7, 0.01, numel=1_000_000), limits.density(8, 0.01, numel=1_000_000)
    (0.001, 0.01)

    Raises:
        MisuseError: a bandwidth or time that is not positive.
    """

    bytes_per_second: Mapping[int, float] = field(default_factory=dict)
    seconds: float = 1.0
    per_entry: float = 3.0

    def __post_init__(self) -> None:
        if not all(value > 0 for value in (*self.bytes_per_second.values(), self.seconds, self.per_entry)):
            raise MisuseError("bandwidths, seconds and bytes an entry must be positive")

    def density(self, node: int, density: float, *, numel: int) -> float:
        """``density``, or less where the client's bandwidth asks for it; at least one entry."""
        check_density(density)
        if node not in self.bytes_per_second or not numel:
            return density
        limit = self.bytes_per_second[node] * self.seconds / self.per_entry / numel
        return min(density, max(limit, 1 / numel))

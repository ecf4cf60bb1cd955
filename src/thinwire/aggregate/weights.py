"""From readings of all workers to their weights: the same numbers on every rank, from the same few floats.

Every worker is compared with the others, leaving it out: what is worse than their median by more than chance allows is
a penalty, and a weight is ``exp(-penalty / temperature)``, scaled by tokens and brought within bounds. There is no
reward: whoever is better gains what the bad ones lose. So workers that do not differ have exactly equal weights.

**Too good to be true.** With two workers, the one whose loss is low makes the other look bad. But a worker that keeps
to one batch, or to a few, learns it by heart, and has a low loss *and no news*: the noise of fresh batches is missing
(:mod:`thinwire.aggregate.tracking`). A worker that is significantly better than the others while its noise is an
implausibly small share of theirs is *suspected*: it is no longer a reference for anybody, and its weight stays at its
share. For a loss, whose noise shrinks as it falls, the noise must be too small relative to the value, too; once
suspected, a worker is cleared when its noise is plausible both ways. In early training such a worker is caught at once;
one that begins to cycle through twenty batches later on may gain for some hundred steps until its noise is gone, and
one whose loss had become small in an honest way before may not be caught at all.

**What cannot be told apart.** Two workers, of whom one has a low loss with the noise of fresh batches and the other a
high one: a corrupted worker, or an easier shard, or a small shard that is reshuffled and learnt by heart (or a cycle of
more than :data:`~thinwire.aggregate.tracking.LAGS` batches)? The high one loses weight. With three and more, the
majority is taken for good. A worker whose noise is honestly less than half of the others', and its loss lower, is
suspected: it loses nothing but what it could have gained, yet with two workers nobody is left to compare the other
with, so a corruption that comes in bursts, which makes one loss high and far noisier, leaves two workers uniform. A
batch that is repeated with wrong labels is learnt by heart like any other, and keeps its share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.aggregate.base import Reading, Signal, State, check_between
from thinwire.aggregate.bounds import fill
from thinwire.aggregate.signals import LossEMA
from thinwire.errors import MisuseError

__all__ = ["SignalWeighted", "Uniform", "Weighting"]

Array = NDArray[np.float64]

_PENALTY_MAX = 50.0
"""In temperatures: a weight of 2e-22. Bounded, so that a worker that recovers comes back in reasonable time."""

_IMPLAUSIBLE, _PLAUSIBLE = 0.5, 0.75
"""Shares of the others' noise. Estimates scatter by some 20 %; a worker that repeats 20 batches was seen at 0.48."""

_CONVICTED = 5.0
"""Temperatures of penalty, a weight of less than a hundredth, from which a worker's noise says nothing of others."""

_TOO_GOOD = 0.5
"""The share of ``significance`` from which a better value is looked at: before it could cost others their weight."""


class Weighting(ABC):
    """Weights of workers from their readings. Laws: they are finite, not negative and sum to 1 (to 1e-12) whatever the
    readings say; they do not depend on the order of the workers; equal readings have equal weights."""

    @property
    @abstractmethod
    def signals(self) -> tuple[Signal, ...]:
        """What is to be read, in this order."""

    @property
    def needs(self) -> frozenset[str]:
        """The fields of :class:`~thinwire.aggregate.base.Observation` that the signals use."""
        return frozenset().union(*(signal.needs for signal in self.signals))

    @abstractmethod
    def init(self, size: int) -> State:
        """The state of ``size`` workers before the first step.

        Raises:
            MisuseError: The bounds cannot hold for so many.
        """

    @abstractmethod
    def weights(
        self, readings: Sequence[Sequence[Reading]], tokens: Sequence[float] | None, state: State
    ) -> tuple[Tensor, State]:
        """Float64 ``[P]`` from the readings ``[P][S]``, and tokens in each worker's batch if they are to count.

        Raises:
            MisuseError: There are readings of another number of workers or signals.
        """

    @abstractmethod
    def resized(self, state: State, kept: Sequence[int | None]) -> State:
        """The state of another group: worker ``i`` was worker ``kept[i]`` so far, or is new (None)."""


@final
@dataclass(frozen=True)
class Uniform(Weighting):
    """Equal weights, or the share of the tokens where tokens are given: the exact mean over tokens."""

    @property
    def signals(self) -> tuple[Signal, ...]:
        return ()

    def init(self, size: int) -> State:
        return {"size": _at_least_one(size)}

    def weights(
        self, readings: Sequence[Sequence[Reading]], tokens: Sequence[float] | None, state: State
    ) -> tuple[Tensor, State]:
        _check_shape(readings, tokens, state["size"], 0)
        return torch.from_numpy(_shares(tokens, state["size"])), state

    def resized(self, state: State, kept: Sequence[int | None]) -> State:
        del state
        return self.init(len(kept))


@final
@dataclass(frozen=True)
class SignalWeighted(Weighting):
    """Less weight to workers whose signals are worse than the others' by more than chance.

    For each signal, worker ``i`` is compared with the median of the others (of an even number the worse of the middle
    two: of three workers, one that is too good does not make the other two look bad). With the gap ``b_i`` in the bad
    direction and its standard error ``e_i`` (its own, the median's, and how far the others differ among themselves
    beyond chance), ``penalty_i = max(0, b_i - max(significance * e_i, tolerance * |median|)) / e_i``. Penalties of
    several signals add, are smoothed over steps, and ``w_i ~ tokens_i * exp(-penalty_i / temperature)``. Where the
    others have less noise than worker ``i``, more is allowed for, by the square of the ratio: they may be the bad ones.

    ``of``: the signals. ``significance``: standard errors that are put down to chance. ``tolerance``: the relative
    difference that does not matter, however sure it is. ``temperature``: standard errors beyond, by which a weight
    falls to 1/e. ``floor``, ``ceiling``: bounds of the final weights; the floor is also what a worker gets in a step in
    which it reports NaN. ``smoothing``: the decay of the penalties' average. ``warmup``: observations that are needed
    before a worker is judged, or others by it. ``freeze_after``: steps after which penalties stay as they are.
    ``suspicion``: off, a low noise is no reason to doubt anybody.

    A worker with nothing to report is neutral. Its weight may be 0, and a gradient of NaN times 0 is NaN: leave it out.

    >>> weighting = SignalWeighted(LossEMA(decay=0.9), warmup=20)
    >>> def reading(loss):
    ...     return (Reading(value=loss, error=0.02, noise=0.1, count=100),)
    >>> state = weighting.init(3)
    >>> weights, state = weighting.weights([reading(2.50), reading(2.52), reading(2.51)], None, state)
    >>> weights.tolist() == [1 / 3] * 3
    True
    >>> for _ in range(20):
    ...     weights, state = weighting.weights([reading(2.50), reading(2.52), reading(3.50)], None, state)
    >>> [round(weight, 3) for weight in weights.tolist()]
    [0.5, 0.5, 0.0]

    Raises:
        MisuseError: A number is out of its range.
    """

    of: Signal | tuple[Signal, ...] = field(default_factory=LossEMA)
    significance: float = field(default=4.0, kw_only=True)
    tolerance: float = field(default=0.005, kw_only=True)
    temperature: float = field(default=2.0, kw_only=True)
    floor: float = field(default=0.0, kw_only=True)
    ceiling: float = field(default=1.0, kw_only=True)
    smoothing: float = field(default=0.9, kw_only=True)
    warmup: int = field(default=100, kw_only=True)
    freeze_after: int | None = field(default=None, kw_only=True)
    suspicion: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not self.signals:
            raise MisuseError("no signals; give one, such as LossEMA(), or take Uniform()")
        check_between("significance", self.significance, 0)
        check_between("tolerance", self.tolerance, 0)
        check_between("temperature", self.temperature, 1e-6)
        check_between("floor", self.floor, 0, 1)
        check_between("ceiling", self.ceiling, self.floor, 1)
        check_between("smoothing", self.smoothing, 0, 1 - 1e-9)
        check_between("warmup", self.warmup, 0)
        if self.freeze_after is not None:
            check_between("freeze_after", self.freeze_after, 0)

    @property
    def signals(self) -> tuple[Signal, ...]:
        return self.of if isinstance(self.of, tuple) else (self.of,)

    def init(self, size: int) -> State:
        if self.floor * _at_least_one(size) > 1 or self.ceiling * size < 1:
            raise MisuseError(
                f"no {size} weights from {self.floor} to {self.ceiling} sum to 1; floor * {size} may be 1 at most and "
                f"ceiling * {size} must be at least 1",
                size=size,
            )
        signals = len(self.signals)
        return {"step": 0, "penalty": [0.0] * size, "suspected": [[False] * size for _ in range(signals)]}

    def resized(self, state: State, kept: Sequence[int | None]) -> State:
        self.init(len(kept))  # refuses what the bounds do not allow
        size = len(state["penalty"])
        if any(old is not None and not 0 <= old < size for old in kept):
            raise MisuseError(f"{list(kept)} names a worker that is not among {size}", size=size)
        return {
            "step": state["step"],
            "penalty": [0.0 if old is None else state["penalty"][old] for old in kept],
            "suspected": [[old is not None and row[old] for old in kept] for row in state["suspected"]],
        }

    def weights(
        self, readings: Sequence[Sequence[Reading]], tokens: Sequence[float] | None, state: State
    ) -> tuple[Tensor, State]:
        size = len(state["penalty"])
        _check_shape(readings, tokens, size, len(self.signals))
        share = _shares(tokens, size)
        by_signal = [[row[s] for row in readings] for s in range(len(self.signals))]
        penalty, suspected = np.array(state["penalty"]), state["suspected"]
        if self.freeze_after is None or state["step"] < self.freeze_after:
            spread = np.sqrt(share * size) if tokens is not None else np.ones(size)
            convicted = penalty >= _CONVICTED * self.temperature
            suspected = [
                self._suspected(signal, column, old, spread, ~convicted)
                for signal, column, old in zip(self.signals, by_signal, state["suspected"], strict=True)
            ]
            doubted = np.any(suspected, axis=0)
            found = np.zeros(size)
            for signal, column in zip(self.signals, by_signal, strict=True):
                found += self._penalties(signal, column, doubted, spread, convicted)
            found = np.minimum(found, _PENALTY_MAX * self.temperature)
            penalty = self.smoothing * penalty + (1 - self.smoothing) * found
            penalty[penalty < 1e-6] = 0.0  # a bygone penalty fades; this is where it is over
        after: State = {"step": state["step"] + 1, "penalty": penalty.tolist(), "suspected": suspected}
        broken = np.array([any(reading.is_broken for reading in row) for row in readings])
        return torch.from_numpy(self._bounded(penalty, np.any(suspected, axis=0), broken, share)), after

    def _bounded(self, penalty: Array, doubted: NDArray[np.bool_], broken: NDArray[np.bool_], share: Array) -> Array:
        if broken.all():
            broken = np.zeros_like(broken)  # nobody is better than anybody
        quality = np.exp(-(penalty - penalty[~broken].min()) / self.temperature)
        quality[broken] = 0.0
        high = np.where(doubted, np.minimum(share, self.ceiling), self.ceiling)
        if high[~broken].sum() + self.floor * broken.sum() < 1:  # the others cannot take what is over
            high = np.full_like(high, self.ceiling)
        return fill(share * quality, share, np.full_like(high, self.floor), np.maximum(high, self.floor))

    def _judged(self, column: Sequence[Reading]) -> NDArray[np.bool_]:
        return np.array([reading.valid and reading.count >= self.warmup for reading in column])

    def _penalties(
        self,
        signal: Signal,
        column: Sequence[Reading],
        doubted: NDArray[np.bool_],
        spread: Array,
        convicted: NDArray[np.bool_],
    ) -> Array:
        """How much worse each worker is than the others, in standard errors beyond what is allowed for, ``[P]``. The
        less noise the others have against its own, the more is allowed for, unless it is convicted already."""
        known = self._judged(column)
        reference = known & ~doubted
        gap, error, median = _against_others(signal, column, known, reference)
        allowed = np.maximum(self.significance * error, self.tolerance * np.abs(median))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            if self.suspicion:
                shares = [
                    np.where(mine > 0, _low_median_of_others(mine, reference) / mine, 1.0)
                    for mine in _noises(signal, column, spread)
                ]
                allowed /= np.where(convicted, 1.0, np.minimum(1.0, np.max(shares, axis=0))) ** 2
            return np.where(gap > allowed, (gap - allowed) / error, 0.0)

    def _suspected(
        self,
        signal: Signal,
        column: Sequence[Reading],
        before: list[bool],
        spread: Array,
        trusted: NDArray[np.bool_],
    ) -> list[bool]:
        """Whose value is better than the others' while its noise, for its tokens, is implausibly small against that of
        the ``trusted`` others: a corrupted worker's grows as the model leaves it behind."""
        known = np.array([reading.valid for reading in column])
        if not self.suspicion:
            return [False] * len(column)
        gap, error, _ = _against_others(signal, column, known, known)
        better = known & (-gap > _TOO_GOOD * self.significance * error)
        noises = _noises(signal, column, spread)
        against = [(mine, _low_median_of_others(mine, known & trusted)) for mine in noises]
        small = np.all([mine < _IMPLAUSIBLE * theirs for mine, theirs in against], axis=0)
        plausible = np.all([mine >= _PLAUSIBLE * theirs for mine, theirs in against], axis=0)
        old = np.array(before)
        suspected = np.where(known, (old & ~plausible) | (better & small), old)
        return [bool(doubt) for doubt in suspected]


def _against_others(
    signal: Signal, column: Sequence[Reading], known: NDArray[np.bool_], reference: NDArray[np.bool_]
) -> tuple[Array, Array, Array]:
    """For each worker the gap to the median of the other ``reference`` workers, positive if it is worse, the gap's
    standard error, and that median, all ``[P]``. Gaps are 0 where there is nothing to compare."""
    size = len(column)
    sign = 1.0 if signal.better == "low" else -1.0
    worse = sign * np.array([reading.value for reading in column])
    error = np.array([reading.error for reading in column])
    others = reference[None, :] & ~np.eye(size, dtype=bool)
    count = others.sum(axis=1)
    enough = known & (count > 0)
    median = _middle(np.where(others, worse, np.inf), count)
    apart = np.abs(worse[None, :] - median[:, None])
    spread = 1.4826 * _middle(np.where(others, apart, np.inf), count, low=True)
    typical = _middle(np.where(others, error, np.inf), count)
    # The median of three and more scatters by sqrt(pi / 2) more than the mean; of one or two it is one of them.
    scatter = typical * np.where(count > 2, np.sqrt(np.pi / 2 / np.maximum(count, 1)), 1.0)
    beyond = np.where(count > 2, np.maximum(0.0, spread**2 - typical**2), 0.0)
    combined = np.sqrt(error**2 + scatter**2 + beyond)
    nothing = np.zeros(size)
    return np.where(enough, worse - median, nothing), np.where(enough, combined, nothing), median


def _middle(rows: Array, count: NDArray[np.int64], low: bool = False) -> Array:
    """The median of the first ``count`` of each sorted row; of an even number the higher, or the lower, of two."""
    index = np.maximum((count - 1) // 2 if low else count // 2, 0)
    found = np.take_along_axis(np.sort(rows, axis=1), index[:, None], axis=1)[:, 0]
    return np.where(np.isfinite(found), found, 0.0)


def _noises(signal: Signal, column: Sequence[Reading], spread: Array) -> list[Array]:
    """The workers' noise as if all had as many tokens, ``[P]``; and its share of the value where that has a meaning."""
    noise = np.array([reading.noise for reading in column]) * spread
    if not signal.ratio_scale:
        return [noise]
    value = np.array([abs(reading.value) for reading in column])
    return [noise, np.divide(noise, value, out=np.zeros_like(noise), where=value > 0)]


def _low_median_of_others(values: Array, known: NDArray[np.bool_]) -> Array:
    others = known[None, :] & ~np.eye(len(values), dtype=bool)
    return _middle(np.where(others, values[None, :], np.inf), others.sum(axis=1), low=True)


def _shares(tokens: Sequence[float] | None, size: int) -> Array:
    """What is each worker's by its tokens alone. Tokens that nobody gave are as many as the others have; what is no
    number of tokens is none."""
    if tokens is None:
        return np.full(size, 1.0 / size)
    given = np.array(tokens, dtype=np.float64)
    valid = np.isfinite(given) & (given >= 0)
    largest = given[valid].max(initial=0.0)
    if largest <= 0:
        return np.full(size, 1.0 / size)
    counted = np.where(valid, given, 0.0) / largest  # sums of huge numbers overflow
    counted[np.isnan(given)] = counted[valid].mean()
    return np.asarray(counted / counted.sum())


def _check_shape(
    readings: Sequence[Sequence[Reading]], tokens: Sequence[float] | None, size: int, signals: int
) -> None:
    if len(readings) != size or (tokens is not None and len(tokens) != size):
        raise MisuseError(f"readings of {len(readings)} workers, and a state of {size}; see resized()", size=size)
    if any(len(row) != signals for row in readings):
        raise MisuseError(f"each worker has {signals} readings, one a signal", signals=signals)


def _at_least_one(size: int) -> int:
    if size < 1:
        raise MisuseError(f"a group of {size}; there is at least one worker", size=size)
    return size

"""Signals of a worker's quality, from what the worker sees anyway.

=============================  ==============================================  ========================================
class                          what it follows                                 better
=============================  ==============================================  ========================================
:class:`LossEMA`               the loss of its batches                         low
:class:`GradientNormStability` how its gradient's norm jumps                   low
:class:`CosineToPrevious`      its gradient's cosine with the last mean        high
:class:`CosineToReference`     its gradient's cosine with a trusted gradient   high (FLTrust, Cao et al. 2021)
:class:`HeldOutImprovement`    what its gradient does for a held-out batch     high (Zeno, Xie et al. 2019)
:class:`Agreement`             the cosine of what it sent with the mean        high
=============================  ==============================================  ========================================

All are averaged and given a standard error in the same way, see :mod:`thinwire.aggregate.tracking`. ``decay`` sets what
gaps can be told: at 0.99 the error of the average is 1/14 of a step's noise, at 0.999 1/45.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import isfinite, log, sqrt
from typing import final

from thinwire.aggregate.base import Observation, Reading, Signal, State, check_decay
from thinwire.aggregate.tracking import follow, follower, lost, reading

__all__ = [
    "SIGNALS",
    "Agreement",
    "CosineToPrevious",
    "CosineToReference",
    "Followed",
    "GradientNormStability",
    "HeldOutImprovement",
    "LossEMA",
]


@dataclass(frozen=True)
class Followed(Signal):
    """A signal that is one number in each step; derive from it and say :meth:`measure`.

    Raises:
        MisuseError: The decay is outside [0, 1).
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def init(self) -> State:
        return follower()

    def update(self, state: State, observation: Observation) -> State:
        fields = [getattr(observation, name) for name in sorted(self.needs)]
        if None in fields:
            return state
        if not all(map(isfinite, fields)):
            return lost(state)
        value = self.measure(observation)
        return state if value is None else follow(state, value, self.decay)

    def read(self, state: State) -> Reading:
        return reading(state)

    @abstractmethod
    def measure(self, observation: Observation) -> float | None:
        """The number of this step, from fields that are there and finite; None where it is not defined."""


@final
@dataclass(frozen=True)
class LossEMA(Followed):
    """The loss of the worker's own batches: what is high for long is wrong labels, garbled text, a broken reader.

    A low one is no merit: see :class:`~thinwire.aggregate.weights.SignalWeighted` about workers that repeat a batch.

    >>> signal = LossEMA(decay=0.9)
    >>> state = signal.init()
    >>> for loss in (3.0, 2.8, 2.9, 2.7, 2.8, 2.6, 2.7, 2.5, 2.6, 2.4):
    ...     state = signal.update(state, Observation(loss=loss))
    >>> reading = signal.read(state)
    >>> round(reading.value, 2), reading.count
    (2.65, 10)
    """

    name = "loss_ema"
    needs = frozenset({"loss"})
    better = "low"
    ratio_scale = True

    def measure(self, observation: Observation) -> float | None:
        return observation.loss


@final
@dataclass(frozen=True)
class GradientNormStability(Signal):
    """By how much the gradient's norm changes from step to step, ``|log norm_t - log norm_(t-1)|``, averaged: no scale
    comes in, so neither the model nor the learning rate does. A gradient of zeros is passed over."""

    name = "grad_norm_stability"
    needs = frozenset({"norm2"})
    better = "low"

    decay: float = 0.99

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def init(self) -> State:
        return {**follower(), "log_norm": None}

    def update(self, state: State, observation: Observation) -> State:
        if observation.norm2 is None or observation.norm2 == 0:
            return state
        last = state["log_norm"]
        if not isfinite(observation.norm2) or observation.norm2 < 0:
            return {**lost(state), "log_norm": last}
        log_norm = log(observation.norm2) / 2
        after = {**state, "lost": False} if last is None else follow(state, abs(log_norm - last), self.decay)
        return {**after, "log_norm": log_norm}

    def read(self, state: State) -> Reading:
        return reading(state)


@final
@dataclass(frozen=True)
class CosineToPrevious(Followed):
    """The cosine of the worker's gradient with the mean that was applied last.

    It rewards going along with the others, so a worker that alone holds rare data looks bad by it."""

    name = "cosine_to_prev_global"
    needs = frozenset({"norm2", "dot_previous", "previous_norm2"})
    better = "high"

    def measure(self, observation: Observation) -> float | None:
        return _cosine(observation.dot_previous, observation.norm2, observation.previous_norm2)


@final
@dataclass(frozen=True)
class CosineToReference(Followed):
    """The cosine of the worker's gradient with that of a small batch that is trusted, as in FLTrust (Cao et al. 2021),
    which clips it at zero and takes it as the weight. Here it is not clipped (how far below zero it is tells as much)
    and only differences between workers that are beyond chance count."""

    name = "cosine_to_reference"
    needs = frozenset({"norm2", "dot_reference", "reference_norm2"})
    better = "high"

    def measure(self, observation: Observation) -> float | None:
        return _cosine(observation.dot_reference, observation.norm2, observation.reference_norm2)


@final
@dataclass(frozen=True)
class HeldOutImprovement(Followed):
    """By how much a step along the worker's gradient alone lowers the loss of a held-out micro-batch: Zeno's stochastic
    descendant score (Xie et al. 2019) without its term for the gradient's norm. Costs two forward passes."""

    name = "held_out_improvement"
    needs = frozenset({"improvement"})
    better = "high"

    def measure(self, observation: Observation) -> float | None:
        return observation.improvement


@final
@dataclass(frozen=True)
class Agreement(Followed):
    """The cosine of what the worker sent with the mean of what all sent. It is had from the compressed stream, so with
    top-k it costs O(k) and says something of the large elements only."""

    name = "agreement"
    needs = frozenset({"agreement"})
    better = "high"

    def measure(self, observation: Observation) -> float | None:
        assert observation.agreement is not None
        return max(-1.0, min(1.0, observation.agreement))


def _cosine(dot: float | None, norm2: float | None, other_norm2: float | None) -> float | None:
    assert dot is not None
    assert norm2 is not None
    assert other_norm2 is not None
    if norm2 <= 0 or other_norm2 <= 0:
        return None
    return max(-1.0, min(1.0, dot / sqrt(norm2) / sqrt(other_norm2)))


_TABLE: tuple[type[Signal], ...] = (
    LossEMA,
    GradientNormStability,
    CosineToPrevious,
    CosineToReference,
    HeldOutImprovement,
    Agreement,
)

SIGNALS: dict[str, type[Signal]] = {signal.name: signal for signal in _TABLE}
"""By name: a new signal is a class and a row."""

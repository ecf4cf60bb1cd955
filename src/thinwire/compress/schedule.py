"""Densities over time: how much to send at which step.

A schedule is pure: :class:`Signals` of a finished step and a state go in, the next state comes out, and the state says
the density of the next step. **All ranks must feed in the same signals**, the averaged loss and the norm of the reduced
gradient rather than their own: equal inputs give equal densities everywhere, and nothing is sent to agree on them.

====================  ==========================================================  =================================
class                 density                                                     source
====================  ==========================================================  =================================
:class:`Constant`     the same                                                    -
:class:`Warmup`       falls exponentially at the start                            Lin et al. 2018 (DGC), section 3.3
:class:`Plateau`      higher while the loss stands still, lower while it falls    -
:class:`Accordion`    high while the gradient norm changes, low while it does not Agarwal et al. 2021, algorithm 1
:class:`ByteBudget`   another schedule's, within a number of bytes                -
====================  ==========================================================  =================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from math import inf, isfinite
from typing import final

from thinwire.compress.base import State, check_density
from thinwire.errors import MisuseError

__all__ = ["Accordion", "ByteBudget", "Constant", "Plateau", "Schedule", "Signals", "Warmup"]


@final
@dataclass(frozen=True)
class Signals:
    """What is known after step ``step`` (counted from 0), alike on all ranks. What is None is left as it was."""

    step: int
    loss: float | None = None
    gradient_norm: float | None = None


class Schedule(ABC):
    """A density over time. Laws: ``density`` is in (0, 1] after any signals, NaN and infinities among them; ``observe``
    leaves the state that it is given as it is; a state is plain numbers, which ``torch.save`` takes."""

    @abstractmethod
    def init(self) -> State:
        """The state before the first step."""

    @abstractmethod
    def observe(self, state: State, signals: Signals) -> State:
        """The state after a step."""

    @abstractmethod
    def density(self, state: State) -> float:
        """The density of the step that comes next."""


@final
@dataclass(frozen=True)
class Constant(Schedule):
    """One density for good."""

    value: float = 0.01

    def __post_init__(self) -> None:
        check_density(self.value)

    def init(self) -> State:
        return {}

    def observe(self, state: State, signals: Signals) -> State:
        del signals
        return state

    def density(self, state: State) -> float:
        del state
        return self.value


@final
@dataclass(frozen=True)
class Warmup(Schedule):
    """From ``start`` to ``end`` in ``steps`` steps, by the same factor each, and ``end`` from then on.

    Early gradients are large and change fast, and residuals of them go stale; Deep Gradient Compression therefore sends
    25 %, 6.25 %, 1.6 %, 0.4 % in its first epochs. This is that curve without its jumps.

    >>> schedule = Warmup(start=0.25, end=0.01, steps=2)
    >>> state = schedule.init()
    >>> densities = [schedule.density(state)]
    >>> for step in range(3):
    ...     state = schedule.observe(state, Signals(step))
    ...     densities.append(schedule.density(state))
    >>> densities
    [0.25, 0.05, 0.01, 0.01]

    Raises:
        MisuseError: A density is outside (0, 1], or there are fewer than one step.
    """

    start: float = 0.25
    end: float = 0.01
    steps: int = 1000

    def __post_init__(self) -> None:
        check_density(self.start)
        check_density(self.end)
        _at_least_one("steps", self.steps)

    def init(self) -> State:
        return {"step": 0}

    def observe(self, state: State, signals: Signals) -> State:
        return {**state, "step": signals.step + 1}

    def density(self, state: State) -> float:
        if state["step"] >= self.steps:
            return self.end
        low, high = sorted((self.start, self.end))
        density: float = self.start * (self.end / self.start) ** (state["step"] / self.steps)
        return min(high, max(low, density))


@final
@dataclass(frozen=True)
class Plateau(Schedule):
    """Follows the mean loss of windows of ``window`` steps: the density is multiplied by ``factor`` after a window that
    improved on the last by a share below ``slow`` (or got worse), and divided by it after one that improved by more
    than ``fast``. It stays within ``minimum`` and ``maximum``.

    While the loss falls fast, coarse steps do; where it stands still, or rises, what is held back may be the reason.
    A loss that is NaN or infinite puts the density at ``maximum`` at once and begins the comparison anew.

    Raises:
        MisuseError: The bounds are not ordered ``0 < minimum <= start <= maximum <= 1``, or so ``slow <= fast``,
            ``factor`` is not above 1, or the window is empty.
    """

    start: float = 0.01
    minimum: float = 0.001
    maximum: float = 0.1
    window: int = 50
    factor: float = 2.0
    slow: float = 0.01
    fast: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.start <= self.maximum <= 1:
            raise MisuseError(f"densities {self.minimum}, {self.start}, {self.maximum}; give them in order, in (0, 1]")
        if not self.slow <= self.fast:
            raise MisuseError(f"slow={self.slow} is above fast={self.fast}")
        if not 1 < self.factor < inf:
            raise MisuseError(f"a factor of {self.factor}; give one above 1, such as 2", factor=self.factor)
        _at_least_one("window", self.window)

    def init(self) -> State:
        return {"density": self.start, **_EMPTY_WINDOW}

    def observe(self, state: State, signals: Signals) -> State:
        if signals.loss is None:
            return state
        if not isfinite(signals.loss):
            return {"density": self.maximum, **_EMPTY_WINDOW}
        state, ended = _follow(state, signals.loss, self.window)
        if ended is None:
            return state
        last, mean = ended
        improvement = _share(last - mean, last)
        density = state["density"]
        if improvement < self.slow:
            density = min(self.maximum, density * self.factor)
        elif improvement > self.fast:
            density = max(self.minimum, density / self.factor)
        return {**state, "density": density}

    def density(self, state: State) -> float:
        return float(state["density"])


@final
@dataclass(frozen=True)
class Accordion(Schedule):
    """``high`` in critical regimes, ``low`` in others. A regime is critical where the mean gradient norm of a window of
    ``window`` steps (the paper: an epoch) differs from that of the window before by a share of ``eta`` or more.

    Agarwal et al., "Accordion: Adaptive Gradient Communication via Critical Learning Regime Identification" (2021),
    algorithm 1. The first two windows are critical, and so is training after a drop of the learning rate: begin again
    with ``init()`` there. A norm that is NaN or infinite begins again likewise.

    Raises:
        MisuseError: A density is outside (0, 1], ``eta`` is not positive, or the window is empty.
    """

    low: float = 0.01
    high: float = 0.1
    window: int = 100
    eta: float = 0.5

    def __post_init__(self) -> None:
        check_density(self.low)
        check_density(self.high)
        if not self.eta > 0:
            raise MisuseError(f"eta={self.eta}; give the share of change that is critical, such as 0.5", eta=self.eta)
        _at_least_one("window", self.window)

    def init(self) -> State:
        return {"critical": True, **_EMPTY_WINDOW}

    def observe(self, state: State, signals: Signals) -> State:
        if signals.gradient_norm is None:
            return state
        if not isfinite(signals.gradient_norm):
            return self.init()
        state, ended = _follow(state, signals.gradient_norm, self.window)
        if ended is None:
            return state
        last, mean = ended
        return {**state, "critical": abs(_share(last - mean, last)) >= self.eta}

    def density(self, state: State) -> float:
        return self.high if state["critical"] else self.low


@final
@dataclass(frozen=True)
class ByteBudget(Schedule):
    """What ``schedule`` wants, but over ``steps`` steps never more than ``total_bytes`` in all.

    A step at density d is planned at ``max(1, round(d * numel))`` entries of ``bytes_per_entry`` bytes (float32 values
    with packed positions at 1 %: 5.1). What a thrifty step leaves is there for later ones: a step may take up to
    ``burst`` times its share of what remains, so that a dense beginning does not starve the end. Once the ``steps`` are
    over, and with them the budget, one entry a step is sent.

    >>> schedule = ByteBudget(Constant(0.1), total_bytes=1000, steps=4, numel=1000, bytes_per_entry=5.0)
    >>> state, planned = schedule.init(), []
    >>> for step in range(4):
    ...     planned.append(round(schedule.density(state) * 1000) * 5)
    ...     state = schedule.observe(state, Signals(step))
    >>> planned, sum(planned)
    ([500, 330, 165, 5], 1000)

    Raises:
        MisuseError: The budget does not pay for one entry a step, or a number is not positive.
    """

    schedule: Schedule
    total_bytes: int
    steps: int
    numel: int
    bytes_per_entry: float = 5.1
    burst: float = 2.0

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("numel", self.numel), ("burst", self.burst)):
            _at_least_one(name, value)
        if not 0 < self.bytes_per_entry < inf:
            raise MisuseError(f"bytes_per_entry={self.bytes_per_entry}; give what a value and its position take")
        if self.total_entries < self.steps:
            raise MisuseError(
                f"{self.total_bytes} bytes do not pay for one entry in each of {self.steps} steps; "
                f"give {int(self.steps * self.bytes_per_entry) + 1} or more",
                total_bytes=self.total_bytes,
            )

    @property
    def total_entries(self) -> int:
        """What the budget pays for, to the entry: floating-point sums might overdraw it."""
        return int(Fraction(self.total_bytes) / Fraction(self.bytes_per_entry))

    def init(self) -> State:
        return {"inner": self.schedule.init(), "step": 0, "spent": 0}

    def observe(self, state: State, signals: Signals) -> State:
        return {
            "inner": self.schedule.observe(state["inner"], signals),
            "step": state["step"] + 1,
            "spent": state["spent"] + self._entries(state),
        }

    def density(self, state: State) -> float:
        return self._entries(state) / self.numel

    def _entries(self, state: State) -> int:
        """Entries of the next step."""
        left: int = self.steps - state["step"]
        if left <= 0:
            return 1
        affordable: int = self.total_entries - state["spent"]
        # Each step behind this one keeps one entry.
        most = min(affordable - (left - 1), int(self.burst * affordable / left))
        wanted = round(self.schedule.density(state["inner"]) * self.numel)
        return max(1, min(self.numel, wanted, most))


# --- windows ----------------------------------------------------------------------------------------------------------

_EMPTY_WINDOW: State = {"last": None, "mean": 0.0, "count": 0}


def _follow(state: State, value: float, window: int) -> tuple[State, tuple[float, float] | None]:
    """Takes ``value`` into the window. Where that fills it, and one was filled before, also both their means."""
    count = state["count"] + 1
    mean = state["mean"] * ((count - 1) / count) + value / count  # a sum could overflow
    if count < window:
        return {**state, "mean": mean, "count": count}, None
    ended = None if state["last"] is None else (state["last"], mean)
    return {**state, "last": mean, "mean": 0.0, "count": 0}, ended


def _share(change: float, of: float) -> float:
    """``change / |of|``; a change from nothing is infinite."""
    if of == 0:
        return 0.0 if change == 0 else inf if change > 0 else -inf
    return change / abs(of)


def _at_least_one(name: str, value: float) -> None:
    if not 1 <= value < inf:
        raise MisuseError(f"{name}={value}; give 1 or more", **{name: value})

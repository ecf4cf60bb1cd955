"""What signals, weightings and aggregators are: pure functions of numbers and a state.

Many workers' updates become one. A *weighting* gives each worker a weight before anything is sent, from *signals* that
each worker reads off its own work and that travel as a few floats. An *aggregator* looks at the updates themselves:

- a **linear** one returns ``sum_i c_i g_i`` and needs only the Gram matrix of the updates to know ``c``. Ranks that
  hold slices of all updates sum their P x P Gram matrices and have the coefficients of the whole;
- a **coordinatewise** one sees each element's P values and nothing else, so it works on slices as it is.

So both kinds cost the bytes of a ring all-reduce: an all-to-all of slices there, an all-gather of results back.
:func:`aggregate` does it on whole updates and is the oracle of the distributed way.

States are plain dicts of numbers and tensors, which ``torch.save`` takes; nothing mutates the one that it is given.
What is configured are frozen dataclasses: equal ones have equal ``repr``, which is how ranks find out that they differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from thinwire.errors import MisuseError, RefuseError

__all__ = [
    "Aggregator",
    "Coordinatewise",
    "Linear",
    "Observation",
    "Reading",
    "Signal",
    "State",
    "aggregate",
    "check_between",
    "check_decay",
    "finite_workers",
    "gram_matrix",
    "weighted_sum",
]

State = dict[str, Any]

_BLOCK = 1 << 22
"""Elements that are widened to float64 at a time."""


# --- what a worker knows about itself ---------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Observation:
    """What one worker found out in one step. What it does not know is None; what is NaN or infinite is reported as it
    is, and counts against the worker.

    ``loss``: of its batch. ``tokens``: in its batch. ``norm2``: its gradient's squared L2 norm. ``dot_previous``,
    ``previous_norm2``: its gradient's dot product with the mean that was applied last, and that mean's squared norm.
    ``dot_reference``, ``reference_norm2``: the same with the gradient of a batch that is trusted. ``improvement``: by
    how much a step along its gradient lowers the loss of a held-out micro-batch. ``agreement``: the cosine of what it
    sent with the mean of what all sent.
    """

    loss: float | None = None
    tokens: float | None = None
    norm2: float | None = None
    dot_previous: float | None = None
    previous_norm2: float | None = None
    dot_reference: float | None = None
    reference_norm2: float | None = None
    improvement: float | None = None
    agreement: float | None = None


@final
@dataclass(frozen=True)
class Reading:
    """A signal of one worker as its peers see it: ``value`` with its standard ``error``, the ``noise`` that is new in
    each step (a standard deviation), and the ``count`` of observations behind them. ``valid`` is False where the
    worker reported something non-finite; a count of 0 says that there is nothing to judge by (yet).

    >>> readings = (Reading(2.5, 0.01, 0.1, 200), Reading.missing())
    >>> Reading.unpack(Reading.pack(readings)) == readings
    True
    """

    WIDTH: ClassVar[int] = 5

    value: float
    error: float
    noise: float
    count: int
    valid: bool = True

    @classmethod
    def missing(cls) -> Reading:
        """Nothing was reported: neither good nor bad."""
        return cls(0.0, 0.0, 0.0, 0, valid=False)

    @classmethod
    def broken(cls) -> Reading:
        """Something non-finite was reported: as bad as can be."""
        return cls(0.0, 0.0, 0.0, 1, valid=False)

    @property
    def is_missing(self) -> bool:
        return self.count == 0

    @property
    def is_broken(self) -> bool:
        return self.count > 0 and not self.valid

    @staticmethod
    def pack(readings: Sequence[Reading]) -> Tensor:
        """Float64 ``[S, 5]``, to be all-gathered (float32 does as well, if all ranks narrow it, the sender too)."""
        rows = [[r.value, r.error, r.noise, float(r.count), float(r.valid)] for r in readings]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), Reading.WIDTH)

    @staticmethod
    def unpack(data: Tensor) -> tuple[Reading, ...]:
        """From ``[S, 5]`` of any float type. Numbers that :meth:`pack` never writes make a broken reading.

        Raises:
            MisuseError: The shape is another.
        """
        if data.dim() != 2 or data.shape[1] != Reading.WIDTH:
            raise MisuseError(f"readings are [S, {Reading.WIDTH}], not {tuple(data.shape)}", shape=tuple(data.shape))
        return tuple(_reading(*row) for row in data.double().tolist())


def _reading(value: float, error: float, noise: float, count: float, valid: float) -> Reading:
    plausible = all(map(isfinite, (value, error, noise, count))) and error >= 0 and noise >= 0
    if not plausible or not 0 <= count < 2**53 or valid not in (0.0, 1.0):
        return Reading.broken()
    if not valid:
        return Reading.broken() if count else Reading.missing()
    return Reading(value, error, noise, int(count)) if count else Reading.missing()


class Signal(ABC):
    """A worker's quality, followed over steps. Laws, kept by ``thinwire.testing.signals.SignalContract``: ``update`` is
    deterministic and leaves its state as it was; after any observations, NaN and infinities among them, ``read`` gives
    finite numbers; an observation without what the signal :attr:`needs` changes nothing."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    """Fields of :class:`Observation`."""
    better: ClassVar[Literal["low", "high"]]
    ratio_scale: ClassVar[bool] = False
    """Whether zero is a natural origin and honest noise grows with the value, as a loss's does."""

    @abstractmethod
    def init(self) -> State:
        """The state before the first step."""

    @abstractmethod
    def update(self, state: State, observation: Observation) -> State:
        """The state after a step."""

    @abstractmethod
    def read(self, state: State) -> Reading:
        """What the peers are told."""


# --- many updates into one --------------------------------------------------------------------------------------------


class Aggregator(ABC):
    """One of :class:`Linear` and :class:`Coordinatewise`; which worker's update is not finite is left out whole."""

    name: ClassVar[str]

    def init(self, size: int) -> State:
        """The state before the first step of ``size`` workers.

        Raises:
            MisuseError: There are too few workers for what was asked.
        """
        del size
        return {}


class Linear(Aggregator):
    """``sum_i c_i g_i``, with coefficients that follow from dot products alone."""

    uses_previous: ClassVar[bool] = False
    """Whether the last row of the Gram matrix, and the last coefficient, is the previous aggregate's."""

    def coefficients(self, gram: Tensor, state: State) -> tuple[Tensor, State]:
        """From float64 ``[P, P]`` (``[P + 1, P + 1]`` with the previous aggregate) to float64 of as many elements.

        A worker whose ``gram[i, i]`` is not finite is left out; its coefficient is 0, and what is 0 must be skipped
        rather than multiplied by, as :func:`weighted_sum` does: 0 times NaN is NaN.

        Raises:
            MisuseError: The matrix is not square float64, or of another size than the state.
            RefuseError: No worker has a finite update. Skip the step.
        """
        workers = gram.shape[0] - self.uses_previous
        if gram.dtype != torch.float64 or gram.dim() != 2 or gram.shape[0] != gram.shape[1] or workers < 1:
            raise MisuseError(f"a Gram matrix is square float64, not {gram.dtype} of {tuple(gram.shape)}")
        kept = gram.diagonal()[:workers].isfinite().nonzero().flatten()
        if kept.numel() == 0:
            raise RefuseError("no worker has a finite update; skip this step", workers=workers)
        rows = kept
        if self.uses_previous:
            rows = torch.cat([kept, kept.new_tensor([workers])])
        chosen, state = self.choose(gram[rows][:, rows], kept, workers, state)
        return torch.zeros(gram.shape[0], dtype=torch.float64).index_copy_(0, rows, chosen), state

    @abstractmethod
    def choose(self, gram: Tensor, kept: Tensor, size: int, state: State) -> tuple[Tensor, State]:
        """Coefficients of the ``Q`` workers ``kept`` out of ``size`` (and of the previous aggregate, last), from their
        finite Gram matrix."""


class Coordinatewise(Aggregator):
    """Each element by itself."""

    @abstractmethod
    def combine(self, slices: Tensor) -> Tensor:
        """From float32 ``[Q, m]`` to float32 ``[m]``: the same slice of the ``Q`` workers whose update is finite in all
        slices, see :func:`finite_workers`."""


def aggregate(updates: Tensor, aggregator: Aggregator, state: State) -> tuple[Tensor, State]:
    """All of ``updates``, float32 ``[P, n]``, into float32 ``[n]``. Workers with a NaN or an infinity are left out.

    >>> import torch
    >>> from thinwire.aggregate import CoordinateMedian, aggregate
    >>> median = CoordinateMedian()
    >>> updates = torch.tensor([[1.0, 2.0], [2.0, 2.0], [1e9, -1e9], [float("nan"), 0.0]])
    >>> aggregate(updates, median, median.init(4))[0]
    tensor([2., 2.])

    Raises:
        MisuseError: The updates are not float32 ``[P, n]``.
        RefuseError: No worker has a finite update. Skip the step: the state is as it was.
    """
    if updates.dtype != torch.float32 or updates.dim() != 2 or updates.shape[0] < 1:
        raise MisuseError(f"updates are float32 [P, n], not {updates.dtype} of shape {tuple(updates.shape)}")
    if isinstance(aggregator, Coordinatewise):
        kept = finite_workers(updates)
        if not kept.any():
            raise RefuseError("no worker has a finite update; skip this step", workers=updates.shape[0])
        return aggregator.combine(updates[kept]), state
    if not isinstance(aggregator, Linear):
        raise MisuseError(f"{type(aggregator).__name__} is neither Linear nor Coordinatewise; derive it from one")
    if not aggregator.uses_previous:
        coefficients, after = aggregator.coefficients(gram_matrix(updates), state)
        return weighted_sum(updates, coefficients), after
    previous = state.get("previous")
    rows = torch.cat([updates, torch.zeros_like(updates[:1]) if previous is None else previous.unsqueeze(0)])
    coefficients, after = aggregator.coefficients(gram_matrix(rows), state)
    result = weighted_sum(rows, coefficients)
    return result, {**after, "previous": result.clone()}


def finite_workers(slices: Tensor) -> Tensor:
    """Bool ``[P]`` of float ``[P, m]``: whose slice is finite. Only who is finite in every slice takes part."""
    return torch.stack([row.isfinite().all() for row in slices])


def gram_matrix(slices: Tensor) -> Tensor:
    """Dot products of the rows of float32 ``[R, m]``, float64 ``[R, R]`` on the CPU. Those of the slices of an update
    add up to those of the update. A row that is not finite has a diagonal element that is not."""
    total = torch.zeros(slices.shape[0], slices.shape[0], dtype=torch.float64, device=slices.device)
    for block in torch.split(slices, max(1, _BLOCK // slices.shape[0]), dim=1):
        wide = block.double()
        total += wide @ wide.T
    return ((total + total.T) / 2).cpu()


def weighted_sum(slices: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_i c_i g_i`` of float32 ``[R, m]``, float32 ``[m]``; rows whose coefficient is 0 are not looked at. Sums in
    float64 and in the order of the rows, so a slice of the result is the result of the slice, bit for bit."""
    taken = [(row, value) for row, value in enumerate(coefficients.tolist()) if value]
    total = torch.zeros(slices.shape[1], dtype=torch.float64, device=slices.device)
    for row, value in taken:
        total.add_(slices[row], alpha=value)
    largest = torch.finfo(torch.float32).max
    return total.clamp_(-largest, largest).float()


def check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise MisuseError(f"a decay of {decay}; give one in [0, 1), such as 0.99", decay=decay)


def check_between(name: str, value: float, low: float, high: float = inf) -> None:
    if not low <= value <= high or value != value:
        raise MisuseError(f"{name}={value}; give a number from {low} to {high}", **{name: value})

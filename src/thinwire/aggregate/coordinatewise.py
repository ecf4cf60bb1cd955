"""Aggregators that look at each element by itself (Yin et al. 2018).

Both keep within the range of the good workers' values in every element. Both are biased where the workers' values are
skewed, and on shards that differ much they leave out what only a minority knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from thinwire.aggregate.base import Coordinatewise, State, check_between
from thinwire.errors import MisuseError

__all__ = ["CoordinateMedian", "TrimmedMean"]


@final
@dataclass(frozen=True)
class CoordinateMedian(Coordinatewise):
    """The median in each element; of an even number the mean of the middle two. Survives any minority."""

    name = "median"

    def combine(self, slices: Tensor) -> Tensor:
        workers = slices.shape[0]
        ordered = slices.sort(dim=0).values
        if workers % 2:
            return ordered[workers // 2].clone()
        return ordered[workers // 2 - 1 : workers // 2 + 1].double().mean(0).float()


@final
@dataclass(frozen=True)
class TrimmedMean(Coordinatewise):
    """The mean in each element without the ``trim`` lowest and the ``trim`` highest values. Survives ``trim`` workers.

    >>> import torch
    >>> TrimmedMean(trim=1).combine(torch.tensor([[1.0], [2.0], [3.0], [-1e30], [1e30]]))
    tensor([2.])

    Raises:
        MisuseError: ``trim`` is negative, or nothing would be left.
    """

    trim: int = 1
    name = "trimmed_mean"

    def __post_init__(self) -> None:
        check_between("trim", self.trim, 0)

    def init(self, size: int) -> State:
        if size <= 2 * self.trim:
            raise MisuseError(f"trim={self.trim} on both sides leaves nothing of {size} workers", size=size)
        return {}

    def combine(self, slices: Tensor) -> Tensor:
        workers = slices.shape[0]
        trim = min(self.trim, (workers - 1) // 2)  # of fewer, where others were left out
        ordered = slices.sort(dim=0).values
        return ordered[trim : workers - trim].double().mean(0).float()

"""Aggregators that look at each element by itself (Yin et al. 2018).

Both keep within the range of the good workers' values in every element. Both are biased where the workers' values are
skewed, and on shards that differ much they leave out what only a minority knows.

``torch.sort`` along the workers takes long, for there are few of them and many elements. So rows are sorted by a
network of elementwise minima and maxima, a block of columns at a time that stays in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from thinwire.aggregate.base import Coordinatewise, State, check_between
from thinwire.errors import MisuseError

__all__ = ["CoordinateMedian", "TrimmedMean"]

_BLOCK = 1 << 18
"""Elements that are sorted at a time: 1 MiB."""


@final
@dataclass(frozen=True)
class CoordinateMedian(Coordinatewise):
    """The median in each element; of an even number the mean of the middle two. Survives any minority.

    >>> import torch
    >>> CoordinateMedian().combine(torch.tensor([[1.0, 5.0], [2.0, 5.0], [1e30, -1e30]]))
    tensor([2., 5.])
    """

    name = "median"

    def combine(self, slices: Tensor) -> Tensor:
        return _mean_of_middle(slices, (slices.shape[0] - 1) // 2)


@final
@dataclass(frozen=True)
class TrimmedMean(Coordinatewise):
    """The mean in each element without the ``trim`` lowest and the ``trim`` highest values. Survives ``trim`` workers.
    Where workers were left out and fewer than ``2 trim + 1`` are there, it is the median.

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
        return _mean_of_middle(slices, min(self.trim, (slices.shape[0] - 1) // 2))


def _mean_of_middle(slices: Tensor, trim: int) -> Tensor:
    """The mean over the sorted rows of ``[Q, m]`` without ``trim`` of them at both ends, in float64."""
    workers = slices.shape[0]
    result = torch.empty_like(slices[0])
    for columns, out in zip(*(torch.split(each, _BLOCK // workers + 1, -1) for each in (slices, result)), strict=True):
        rows = list(columns)
        for low, high in network(workers):
            rows[low], rows[high] = torch.minimum(rows[low], rows[high]), torch.maximum(rows[low], rows[high])
        total = rows[trim].double()
        for row in rows[trim + 1 : workers - trim]:
            total += row
        out.copy_(total / (workers - 2 * trim))
    return result


@lru_cache(maxsize=64)
def network(rows: int) -> tuple[tuple[int, int], ...]:
    """Batcher's merge exchange (Knuth, volume 3, algorithm 5.2.2M): pairs to bring in order, one after the other, after
    which any ``rows`` values are sorted."""
    pairs = []
    top = 1 << max(0, (rows - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(rows - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return tuple(pairs)

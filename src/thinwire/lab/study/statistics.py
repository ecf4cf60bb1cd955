"""Means with intervals, rank correlations and rank tests, for a handful of seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thinwire.errors import MisuseError

__all__ = ["Estimate", "correlation", "friedman", "mean_of"]

_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % points of Student's t for 1 to 30 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value from ``count`` seeds (or runs) and its 95 % interval."""

    value: float
    low: float
    high: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval is on one side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean and Student's interval; of one value, an interval without end.

    >>> mean_of([1.0, 2.0, 3.0])
    Estimate(value=2.0, low=-0.484..., high=4.484..., count=3)
    """
    if not len(values):
        raise MisuseError("a mean needs a value")
    numbers = np.asarray(values, np.float64)
    mean, count = float(numbers.mean()), numbers.size
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    factor = _T975[count - 2] if count - 2 < len(_T975) else 1.96 + 2.4 / (count - 1)
    half = factor * float(numbers.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 0, equal values sharing the mean of theirs."""
    order = np.sort(values)
    found: npt.NDArray[np.float64] = (
        np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") - 1
    ) / 2
    return found


def _spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    x, y = _ranks(a), _ranks(b)
    if not (np.ptp(x) and np.ptp(y)):
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def correlation(a: Sequence[float], b: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Spearman's rank correlation of pairs, with the percentile interval of a bootstrap over them.

    >>> correlation([1, 2, 3, 4, 5, 6], [1, 4, 9, 16, 25, 36]).value
    1.0
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.size < 3:
        raise MisuseError("a correlation needs three pairs or more")
    source = np.random.default_rng(seed)
    draws = source.integers(0, x.size, (resamples, x.size))
    found = np.array([_spearman(x[rows], y[rows]) for rows in draws])
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(_spearman(x, y), float(low), float(high), int(x.size))


def friedman(table: npt.NDArray[np.float64], *, resamples: int = 5000, seed: int = 0) -> float:
    """The p-value that columns [seeds, columns] differ in rank beyond chance: Friedman's statistic (1937), under random
    permutations within rows.

    >>> same_order = np.array([[1.0, 2, 3, 4]] * 6)
    >>> friedman(same_order) < 0.01
    True
    """
    ranks = np.stack([_ranks(row) for row in np.asarray(table, np.float64)])
    if ranks.ndim != 2 or min(ranks.shape) < 2:
        raise MisuseError("the test needs two rows and two columns or more")

    def statistic(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = (rows.mean(axis=-2) ** 2).sum(axis=-1)
        return found

    source = np.random.default_rng(seed)
    shuffled = source.permuted(np.broadcast_to(ranks, (resamples, *ranks.shape)).copy(), axis=-1)
    return float((1 + (statistic(shuffled) >= statistic(ranks) - 1e-12).sum()) / (1 + resamples))

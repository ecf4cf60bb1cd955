"""Means over seeds with bootstrap intervals, paired differences between methods, and the verdict they allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thinwire.bench.sparserl_summary import Summary
from thinwire.errors import MisuseError
from thinwire.lab.study.statistics import Estimate, mean_of

__all__ = ["Comparison", "bootstrap", "cells_of", "compare", "difference", "pairs_of"]

_RESAMPLES = 10_000


def bootstrap(strata: Sequence[Sequence[float]], *, seed: int = 0) -> Estimate:
    """The mean of the strata's means, and its 95 % percentile interval; each stratum is resampled on its own.

    Strata are a method's tasks and models, values in them its seeds. Few values make such an interval too narrow
    (of 5, by a tenth), which is why :func:`compare` asks Student's as well.

    Raises:
        MisuseError: no stratum, an empty one, or a value that is not finite.

    >>> bootstrap([[1.0, 2.0, 3.0]])
    Estimate(value=2.0, low=1.0, high=3.0, count=3)
    """
    if not strata or not all(strata) or not all(math.isfinite(v) for values in strata for v in values):
        raise MisuseError("a bootstrap needs values, all of them finite")
    source = np.random.default_rng(seed)
    means = np.zeros(_RESAMPLES)
    for values in strata:
        numbers = np.asarray(values, np.float64)
        means += numbers[source.integers(0, numbers.size, (_RESAMPLES, numbers.size))].mean(axis=1)
    low, high = np.quantile(means / len(strata), [0.025, 0.975])
    value = float(np.mean([np.mean(values) for values in strata]))
    return Estimate(value, float(low), float(high), sum(map(len, strata)))


def cells_of(summaries: Sequence[Summary]) -> dict[tuple[str, str, str], list[Summary]]:
    """Runs by (model, task, method)."""
    found: dict[tuple[str, str, str], list[Summary]] = {}
    for summary in summaries:
        found.setdefault((summary["model"], summary["task"], summary["method"]), []).append(summary)
    return found


def pairs_of(
    summaries: Sequence[Summary], method: str, against: str, metric: str = "score"
) -> dict[tuple[str, str], dict[int, float]]:
    """By (model, task) and seed: ``method`` less ``against``, of runs that start from the same weights."""
    values: dict[tuple[str, str, str, int], Any] = {
        (s["model"], s["task"], s["method"], s["seed"]): s[metric] for s in summaries
    }
    found: dict[tuple[str, str], dict[int, float]] = {}
    for (model, task, name, seed), value in values.items():
        other = values.get((model, task, against, seed))
        if name == method and value is not None and other is not None:
            found.setdefault((model, task), {})[seed] = value - other
    return found


def difference(pairs: Mapping[tuple[str, str], Mapping[int, float]]) -> Estimate | None:
    """The mean of paired differences, resampled within each model and task; None of none."""
    return bootstrap([list(by_seed.values()) for by_seed in pairs.values()]) if pairs else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """``method`` against ``against``: the paired difference of the score.

    ``bootstrap`` is over seeds within models and tasks, ``student`` over the seeds' means; ``verdict`` is ``better`` or
    ``worse`` only where both intervals leave 0 out, else ``undecided``.
    """

    method: str
    against: str
    bootstrap: Estimate
    student: Estimate

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``undecided``."""
        if self.bootstrap.sign != self.student.sign:
            return "undecided"
        return {1: "better", -1: "worse", 0: "undecided"}[self.bootstrap.sign]


def compare(summaries: Sequence[Summary], method: str, against: str) -> Comparison | None:
    """The two methods where both were run from the same starts; None where they nowhere were."""
    pairs = pairs_of(summaries, method, against)
    found = difference(pairs)
    if found is None:
        return None
    by_seed: dict[int, list[float]] = {}
    for values in pairs.values():
        for seed, value in values.items():
            by_seed.setdefault(seed, []).append(value)
    return Comparison(method, against, found, mean_of([float(np.mean(v)) for v in by_seed.values()]))

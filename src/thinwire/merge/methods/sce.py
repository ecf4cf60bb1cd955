"""SCE: select where the tasks differ most, weigh tasks by energy, erase minority signs (Wan et al. 2024,
arXiv:2408.07990), with mergekit's conventions."""

from __future__ import annotations

import numpy as np

from thinwire.merge.combine import Vector, reduce, variances
from thinwire.merge.methods.base import Method, Parameter, Settings, Task
from thinwire.merge.sparsify import largest

__all__ = ["METHODS"]

_ENERGY_EPS = 1e-6


def _select(vectors: list[Vector], all_tasks: int, share: float) -> list[Vector]:
    if share >= 1:
        return vectors
    empty = [v.where(np.zeros(v.values.size, np.bool_)) for v in vectors[:1]] * (all_tasks - len(vectors))
    positions, spread = variances([*vectors, *empty])
    keep = largest(spread, int(np.count_nonzero(spread) * share))
    chosen = positions[keep]
    return [v.where(np.isin(v.positions, chosen, assume_unique=True)) for v in vectors]


def _sce(tasks: list[Task], settings: Settings) -> Vector:
    count = len(settings["all_weights"])
    vectors = _select([task.vector for task in tasks], count, settings["select_topk"])
    energy = np.array([np.square(v.values, dtype=np.float64).sum() for v in vectors]) / max(tasks[0].size, 1)
    total = float(energy.sum())
    weights = energy / total if total >= _ENERGY_EPS else np.full(len(vectors), 1 / count)
    return reduce(vectors, weights.tolist(), vote="total", divide="weights_clamped").scaled(settings["lambda"])


METHODS = (
    Method(
        "sce", "Select, calculate, erase", "arXiv:2408.07990", "mergekit",
        {"lambda": Parameter(1.0), "select_topk": Parameter(1.0, least=0, most=1)}, _sce,
    ),
)  # fmt: skip

"""Generalised task arithmetic: sparsify each task vector, weigh it, agree on signs or not, add up.

mergekit's frame for task arithmetic (Ilharco et al. 2022, arXiv:2212.04089), TIES, DARE, DELLA and Breadcrumbs: they
differ in the sparsifier and in whether signs are elected.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from thinwire.merge.combine import Vector, reduce
from thinwire.merge.methods.base import COMMON, Method, Parameter, Settings, Task

__all__ = ["general", "weighted_sum"]

Sparsifier = Callable[[Task, Settings], Vector]

_NORMALIZE_EPS = 1e-8  # mergekit's: a sum of weights this small is not divided by


def weighted_sum(vectors: list[Vector], weights: list[float], *, normalize: bool, all_weights: list[float]) -> Vector:
    """The sum of weighted vectors, divided by the sum of all tasks' weights where asked."""
    total = reduce(vectors, weights)
    kind = total.values.dtype.type
    divisor = np.asarray(all_weights, kind).sum(dtype=kind)
    if not normalize or abs(divisor) < _NORMALIZE_EPS:
        return total
    return Vector(total.positions, total.values / divisor, total.cells)


def general(
    name: str,
    title: str,
    source: str,
    sparsifier: Sparsifier,
    *,
    elect: bool,
    normalize: bool,
    parameters: dict[str, Parameter],
) -> Method:
    """A method of this family, with mergekit's conventions."""

    def combine(tasks: list[Task], settings: Settings) -> Vector:
        vectors = [sparsifier(task, settings) for task in tasks]
        weights = [task.weight for task in tasks]
        if elect:
            return reduce(
                vectors, weights, vote="weighted", divide="weights" if settings["normalize"] else "nothing"
            ).scaled(settings["lambda"])
        total = weighted_sum(
            vectors, weights, normalize=settings["normalize"], all_weights=list(settings["all_weights"])
        )
        return total.scaled(settings["lambda"])

    found = {**COMMON, "normalize": Parameter(normalize), **parameters}
    return Method(name, title, source, "mergekit", found, combine)

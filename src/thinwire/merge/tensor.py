"""Merging the deltas of one tensor into one: what every way of merging, by files or in memory, comes down to.

>>> import torch
>>> from thinwire.merge.delta import delta_between
>>> from thinwire.merge.recipe import recipe_of
>>> base = torch.tensor([1.0, 2.0, 3.0])
>>> deltas = [delta_between(base, torch.tensor(new)) for new in ([2.0, 2.0, 3.0], [1.0, 2.0, 5.0])]
>>> merged = merge_tensor("w", deltas, recipe_of("task_arithmetic", 2, weight=[0.5, 1.0]))
>>> delta_values = merged.values(merged.new)
>>> merged.positions.tolist(), delta_values.tolist()
([0, 2], [1.5, 5.0])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from thinwire.errors import MisuseError
from thinwire.merge.combine import Vector, count_overlap
from thinwire.merge.delta import MERGEABLE, TensorDelta, cells_from, delta_of_cells, floats_of
from thinwire.merge.methods.base import Task
from thinwire.merge.recipe import Recipe

__all__ = ["merge_tensor", "surveyed", "vector_of"]


def vector_of(delta: TensorDelta, name: str = "a tensor") -> Vector:
    """The task vector: differences that are not 0, in float32 (float64 for F64).

    Raises:
        MisuseError: a difference is NaN or infinite, or the data type has no numbers.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        values = delta.differences()
    finite = np.isfinite(values)
    if not finite.all():
        at = int(delta.positions[np.flatnonzero(~finite)[0]])
        raise MisuseError(
            f"{name} changes at {at} from or to NaN or infinity, which cannot be merged; leave the fine-tune out, or "
            "mend it",
            tensor=name,
            position=at,
        )
    return Vector(delta.positions, values, delta.base).where(values != 0)


def surveyed(recipe: Recipe, tensors: Iterable[tuple[str, Sequence[TensorDelta]]]) -> Recipe:
    """The recipe with what its method has to know of the whole model; ``tensors`` are read only if it has to know.

    ``tensors`` gives each changed tensor's name and one delta a task. Tensors without numbers do not count.

    Raises:
        MisuseError: as :func:`merge_tensor`.
    """
    if recipe.method.survey is None:
        return recipe
    counts = []
    for name, deltas in tensors:
        if deltas[0].dtype in MERGEABLE:
            threshold = recipe.at(name).shared.get("epsilon", 0.0)
            vectors = [vector_of(delta, f"{name} of task {i + 1}") for i, delta in enumerate(deltas)]
            counts.append(count_overlap(vectors, threshold))
    empty = [0.0] * len(recipe.tasks)
    return replace(recipe, survey=tuple(recipe.method.survey(counts) if counts else empty))


def merge_tensor(name: str, deltas: Sequence[TensorDelta], recipe: Recipe) -> TensorDelta:
    """The merged delta of the tensor ``name`` from one delta of each task, empty ones included.

    Sums run in float32 (float64 for F64), whatever the data type, and are rounded to it once. Tensors that hold no
    numbers are taken over if all tasks that change them agree.

    Raises:
        MisuseError: the deltas are of other tensors or not one a task; NaN or infinity in a delta; the result does not
            fit the data type; or tasks disagree on what cannot be averaged.
    """
    first = deltas[0] if deltas else None
    if first is None or len(deltas) != len(recipe.tasks):
        raise MisuseError(f"{name}: {len(deltas)} deltas for {len(recipe.tasks)} tasks")
    if recipe.method.survey is not None and recipe.survey is None:
        raise MisuseError(f"{recipe.method.name} has to know all tensors first: take the recipe that surveyed() gives")
    for delta in deltas:
        if (delta.dtype, delta.shape) != (first.dtype, first.shape):
            raise MisuseError(
                f"{name} is {first.dtype} {first.shape} in one task and {delta.dtype} {delta.shape} in another",
                tensor=name,
            )
    changed = [(i, delta) for i, delta in enumerate(deltas) if delta.changed]
    if not changed:
        return first
    if first.dtype not in MERGEABLE:
        return _agreed(name, [delta for _, delta in changed])
    found = recipe.at(name)
    tasks = []
    for i, delta in changed:
        vector = vector_of(delta, f"{name} of task {i + 1}")
        if vector.values.size:
            tasks.append(Task(vector, i, name, first.shape, found.tasks[i]))
    if not tasks:
        return _none_of(first)
    return _added(name, first, recipe.method.combine(tasks, found.shared))


def _added(name: str, like: TensorDelta, vector: Vector) -> TensorDelta:
    base = floats_of(vector.cells, like.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        merged = base + vector.values
    new = cells_from(merged, like.dtype)
    sound = np.isfinite(merged) & np.isfinite(floats_of(new, like.dtype))
    if not sound.all():
        at = int(vector.positions[np.flatnonzero(~sound)[0]])
        raise MisuseError(
            f"{name}: the merged value at {at} does not fit {like.dtype}; lower the weights or lambda",
            tensor=name,
        )
    return delta_of_cells(like.dtype, like.shape, vector.positions, vector.cells, new)


def _agreed(name: str, deltas: list[TensorDelta]) -> TensorDelta:
    first = deltas[0]
    for delta in deltas[1:]:
        if not (np.array_equal(delta.positions, first.positions) and np.array_equal(delta.new, first.new)):
            raise MisuseError(
                f"tasks change {name} ({first.dtype}) in different ways, and {first.dtype} cannot be averaged; leave "
                "one of them out",
                tensor=name,
            )
    return first


def _none_of(like: TensorDelta) -> TensorDelta:
    return TensorDelta(like.dtype, like.shape, like.positions[:0], like.base[:0], like.new[:0])

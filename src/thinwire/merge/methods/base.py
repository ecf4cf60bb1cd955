"""What a merge method is: a name, its source, its parameters, and a function of sparse vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from thinwire.merge import sparsify
from thinwire.merge.combine import Counts, Vector

__all__ = ["COMMON", "Method", "Parameter", "Settings", "Task", "rescaled"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter: its default (whose type is its type), whether each task has its own, and its bounds, inclusive."""

    default: float | bool | str
    per_task: bool = False
    least: float = -1e6
    most: float = 1e6
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """One fine-tune's part of one tensor: its vector, the tensor's name and shape, and the task's own parameters."""

    vector: Vector
    index: int
    tensor: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Cells of the dense vector."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def weight(self) -> float:
        """The task's weight."""
        return float(self.parameters["weight"])

    def uniforms(self, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """A random number for each entry."""
        return sparsify.uniforms(self.vector.positions, seed=seed, task=self.index, tensor=self.tensor)


Settings = Mapping[str, Any]
"""Parameters that all tasks share, by name."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way of merging. ``combine`` takes the tasks that have changes in a tensor, at least one, and *all* weights are
    those of the tasks; it gives the vector to add to the base. ``survey``, where there is one, makes a number for each
    task of how their changes meet in every tensor; ``combine`` finds them in ``settings["survey"]``."""

    name: str
    title: str
    source: str
    agrees_with: str
    parameters: Mapping[str, Parameter]
    combine: Callable[[list[Task], Settings], Vector]
    survey: Callable[[Sequence[Counts]], list[float]] | None = None


COMMON = {"weight": Parameter(1.0, per_task=True), "lambda": Parameter(1.0)}


def rescaled(task: Task, keep: sparsify.Mask, *, rescale: bool) -> Vector:
    """The kept entries; with ``rescale`` scaled to the L1 norm of all, mergekit's convention."""
    factor = sparsify.rescale_l1(task.vector.values, keep) if rescale else 1.0
    return task.vector.where(keep).scaled(factor)

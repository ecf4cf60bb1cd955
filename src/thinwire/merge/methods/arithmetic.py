"""Sums: linear, task arithmetic, PEFT's magnitude pruning, and the mean over the tasks that changed a weight."""

from __future__ import annotations

from thinwire.errors import MisuseError
from thinwire.merge import sparsify
from thinwire.merge.combine import Vector, reduce
from thinwire.merge.methods.base import COMMON, Method, Parameter, Settings, Task
from thinwire.merge.methods.general import general, weighted_sum

__all__ = ["METHODS"]


def _linear(tasks: list[Task], settings: Settings) -> Vector:
    """The weighted mean of whole models (Wortsman et al. 2022, arXiv:2203.05482): the base plus that of the vectors."""
    weights = list(settings["all_weights"])
    if abs(sum(weights)) < 1e-8 or not (settings["normalize"] or abs(sum(weights) - 1) < 1e-6):
        raise MisuseError(
            f"weights that add up to {sum(weights):g} scale every weight of the base, too: set normalize, give weights "
            "that add up to 1, or take task_arithmetic"
        )
    found = weighted_sum([t.vector for t in tasks], [t.weight for t in tasks], normalize=True, all_weights=weights)
    return found.scaled(settings["lambda"])


def _magnitude_prune(tasks: list[Task], settings: Settings) -> Vector:
    vectors = [
        t.vector.where(sparsify.magnitude(t.vector.values, size=t.size, density=t.parameters["density"], least=0))
        for t in tasks
    ]
    return reduce(vectors, [t.weight for t in tasks]).scaled(settings["lambda"])


def _changed_mean(tasks: list[Task], settings: Settings) -> Vector:
    """Each weight's mean over the tasks that changed it: unchanged weights do not dilute the changed ones."""
    return reduce([t.vector for t in tasks], [t.weight for t in tasks], divide="weights").scaled(settings["lambda"])


METHODS = (
    Method(
        "linear", "Weighted mean of the models", "arXiv:2203.05482", "mergekit",
        {**COMMON, "normalize": Parameter(True)}, _linear,
    ),
    general(
        "task_arithmetic", "Task arithmetic", "arXiv:2212.04089", lambda task, _: task.vector,
        elect=False, normalize=False, parameters={},
    ),
    Method(
        "magnitude_prune", "Task arithmetic of the largest changes", "PEFT", "PEFT",
        {**COMMON, "density": Parameter(1.0, per_task=True, least=0, most=1)}, _magnitude_prune,
    ),
    Method("changed_mean", "Mean over the tasks that changed a weight", "thinwire", "", COMMON, _changed_mean),
)  # fmt: skip

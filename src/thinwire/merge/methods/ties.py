"""TIES: trim, elect signs, merge what agrees (Yadav et al. 2023, arXiv:2306.01708).

mergekit elects by weighted values and divides by the weights that agree; PEFT elects by plain values (or by counting
signs), and divides by how many agree. With equal weights w the two differ by that factor w.
"""

from __future__ import annotations

from thinwire.merge import sparsify
from thinwire.merge.combine import Vector, reduce
from thinwire.merge.methods.base import COMMON, Method, Parameter, Settings, Task, rescaled
from thinwire.merge.methods.general import general

__all__ = ["METHODS"]

DENSITY = {"density": Parameter(1.0, per_task=True, least=0, most=1)}
SIGNS = {"majority_sign_method": Parameter("total", choices=("total", "frequency"))}


def _trim(task: Task, settings: Settings) -> Vector:
    keep = sparsify.magnitude(task.vector.values, size=task.size, density=task.parameters["density"])
    return rescaled(task, keep, rescale=settings["rescale"])


def _ties_peft(tasks: list[Task], settings: Settings) -> Vector:
    vectors = [
        t.vector.where(sparsify.magnitude(t.vector.values, size=t.size, density=t.parameters["density"], least=0))
        for t in tasks
    ]
    found = reduce(vectors, [t.weight for t in tasks], vote=settings["majority_sign_method"], divide="count")
    return found.scaled(settings["lambda"])


METHODS = (
    general(
        "ties", "TIES", "arXiv:2306.01708", _trim,
        elect=True, normalize=True, parameters={**DENSITY, "rescale": Parameter(False)},
    ),
    Method("ties_peft", "TIES as PEFT has it", "arXiv:2306.01708", "PEFT", {**COMMON, **DENSITY, **SIGNS}, _ties_peft),
)  # fmt: skip

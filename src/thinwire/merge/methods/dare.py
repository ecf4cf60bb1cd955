"""DARE: drop at random and rescale (Yu et al. 2023, arXiv:2311.03099).

The paper and PEFT divide what stays by the density; mergekit scales it back to the L1 norm of all. Both are here. Which
entries stay is decided by :func:`~thinwire.merge.sparsify.uniforms`, not by the libraries' generators.
"""

from __future__ import annotations

from thinwire.merge import sparsify
from thinwire.merge.combine import Vector, reduce
from thinwire.merge.methods.base import COMMON, Method, Parameter, Settings, Task, rescaled
from thinwire.merge.methods.general import general
from thinwire.merge.methods.ties import DENSITY, SIGNS

__all__ = ["METHODS"]

SEED = {"seed": Parameter(0, least=0, most=2**63)}


def _drop(task: Task, settings: Settings) -> Vector:
    density = task.parameters["density"]
    keep = sparsify.random(task.uniforms(settings["seed"]), density=density)
    return rescaled(task, keep, rescale=settings["rescale"] and density < 1)


def _drop_peft(task: Task, settings: Settings) -> Vector:
    density = task.parameters["density"]
    keep = sparsify.random(task.uniforms(settings["seed"]), density=density)
    found = task.vector.where(keep)
    if density in (0, 1):
        return found
    return Vector(found.positions, found.values / found.values.dtype.type(density), found.cells)


def _dare_linear_peft(tasks: list[Task], settings: Settings) -> Vector:
    found = reduce([_drop_peft(t, settings) for t in tasks], [t.weight for t in tasks])
    return found.scaled(settings["lambda"])


def _dare_ties_peft(tasks: list[Task], settings: Settings) -> Vector:
    vectors = [_drop_peft(t, settings) for t in tasks]
    found = reduce(vectors, [t.weight for t in tasks], vote=settings["majority_sign_method"], divide="count")
    return found.scaled(settings["lambda"])


_SOURCE = "arXiv:2311.03099"
_OURS = {**DENSITY, **SEED, "rescale": Parameter(True)}
_PEFT = {**COMMON, **DENSITY, **SEED}
METHODS = (
    general("dare_linear", "DARE", _SOURCE, _drop, elect=False, normalize=False, parameters=_OURS),
    general("dare_ties", "DARE with TIES's signs", _SOURCE, _drop, elect=True, normalize=False, parameters=_OURS),
    Method("dare_linear_peft", "DARE, divided by the density", _SOURCE, "PEFT", _PEFT, _dare_linear_peft),
    Method("dare_ties_peft", "DARE, TIES as PEFT has them", _SOURCE, "PEFT", {**_PEFT, **SIGNS}, _dare_ties_peft),
)

"""DELLA: drop at random, the larger a change among its row the less likely (Deep et al. 2024, arXiv:2406.11617)."""

from __future__ import annotations

from thinwire.errors import MisuseError
from thinwire.merge import sparsify
from thinwire.merge.combine import Vector
from thinwire.merge.methods.base import Parameter, Settings, Task, rescaled
from thinwire.merge.methods.dare import SEED
from thinwire.merge.methods.general import general
from thinwire.merge.methods.ties import DENSITY

__all__ = ["METHODS"]


def _magprune(task: Task, settings: Settings) -> Vector:
    density, epsilon = task.parameters["density"], task.parameters["epsilon"]
    vector = task.vector
    if density >= 1:
        return vector
    if density > 0 and not (density - epsilon > 0 and density + epsilon < 1):
        raise MisuseError(f"density {density:g} with epsilon {epsilon:g}: the one plus or minus the other must stay "
                          "between 0 and 1; lower epsilon")  # fmt: skip
    chances = sparsify.rank_probabilities(
        vector.values, vector.positions, task.shape, density=density, epsilon=epsilon if density > 0 else 0.0
    )
    return rescaled(task, task.uniforms(settings["seed"]) < chances, rescale=settings["rescale"])


_PARAMETERS = {
    **DENSITY,
    **SEED,
    "epsilon": Parameter(0.15, per_task=True, least=0, most=0.5),
    "rescale": Parameter(True),
}
_SOURCE = "arXiv:2406.11617"
METHODS = (
    general("della", "DELLA", _SOURCE, _magprune, elect=True, normalize=True, parameters=_PARAMETERS),
    general(
        "della_linear", "DELLA without signs", _SOURCE, _magprune, elect=False, normalize=False, parameters=_PARAMETERS
    ),
)

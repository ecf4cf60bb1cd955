"""Model Breadcrumbs: leave out the smallest changes and the outliers (Davari and Belilovsky 2023, arXiv:2312.06795)."""

from __future__ import annotations

from thinwire.merge import sparsify
from thinwire.merge.combine import Vector
from thinwire.merge.methods.base import Parameter, Settings, Task, rescaled
from thinwire.merge.methods.general import general
from thinwire.merge.methods.ties import DENSITY

__all__ = ["METHODS"]


def _outliers(task: Task, settings: Settings) -> Vector:
    keep = sparsify.magnitude_outliers(
        task.vector.values, size=task.size, density=task.parameters["density"], gamma=task.parameters["gamma"]
    )
    return rescaled(task, keep, rescale=settings["rescale"])


_PARAMETERS = {**DENSITY, "gamma": Parameter(0.01, per_task=True, least=0, most=1), "rescale": Parameter(False)}
_SOURCE = "arXiv:2312.06795"
METHODS = (
    general("breadcrumbs", "Breadcrumbs", _SOURCE, _outliers, elect=False, normalize=False, parameters=_PARAMETERS),
    general(
        "breadcrumbs_ties", "Breadcrumbs with TIES's signs", _SOURCE, _outliers,
        elect=True, normalize=False, parameters=_PARAMETERS,
    ),
)  # fmt: skip

"""RAM: average what several tasks changed, keep what one alone changed (Yuan et al. 2026, arXiv:2601.13572).

RAM+ scales a task's own changes up by ``1 + r * clip(rho, 0, alpha)``, rho being its shared changes over its own. The
paper takes rho over the whole model; ``ramplus_tl`` takes it tensor by tensor, as mergekit's method of that name, so
that a merge needs one tensor at a time.
"""

from __future__ import annotations

from thinwire.merge.combine import Vector, count_overlap, reduce_changed
from thinwire.merge.methods.base import Method, Parameter, Settings, Task

__all__ = ["METHODS"]


def _ram(tasks: list[Task], settings: Settings) -> Vector:
    return reduce_changed([t.vector for t in tasks], settings["epsilon"], [1.0] * len(tasks)).scaled(settings["lambda"])


def _ramplus(tasks: list[Task], settings: Settings) -> Vector:
    vectors, epsilon = [t.vector for t in tasks], settings["epsilon"]
    counts = count_overlap(vectors, epsilon)
    scales = []
    for shared, unique in zip(counts.shared.tolist(), counts.unique.tolist(), strict=True):
        rho = shared / max(unique, epsilon, 1e-12)
        scales.append(1 + settings["r"] * min(max(rho, 0.0), settings["alpha"]))
    return reduce_changed(vectors, epsilon, scales).scaled(settings["lambda"])


_PARAMETERS = {"lambda": Parameter(1.0), "epsilon": Parameter(1e-5, least=0, most=1e6)}
METHODS = (
    Method("ram", "Reinforced agent merging", "arXiv:2601.13572", "mergekit", _PARAMETERS, _ram),
    Method(
        "ramplus_tl", "RAM+, tensor by tensor", "arXiv:2601.13572", "mergekit",
        {**_PARAMETERS, "r": Parameter(0.1, least=0), "alpha": Parameter(0.2, least=0)}, _ramplus,
    ),
)  # fmt: skip

"""RAM: average what several tasks changed, keep what one alone changed (Yuan et al. 2026, arXiv:2601.13572).

RAM+ scales a task's own changes up by ``1 + r * clip(rho, 0, alpha)``, rho being its shared changes over its own.
``ramplus`` takes rho over the whole model, as the paper does (all tensors are looked through first, one at a time);
``ramplus_tl`` takes it tensor by tensor, as mergekit's method of that name.
"""

from __future__ import annotations

from collections.abc import Sequence

from thinwire.merge.combine import Counts, Vector, count_overlap, reduce_changed
from thinwire.merge.methods.base import Method, Parameter, Settings, Task

__all__ = ["METHODS"]


def _ram(tasks: list[Task], settings: Settings) -> Vector:
    return reduce_changed([t.vector for t in tasks], settings["epsilon"], [1.0] * len(tasks)).scaled(settings["lambda"])


def _ratios(counts: Sequence[Counts]) -> list[float]:
    """Each task's shared changes over its own, of all tensors together."""
    shared, unique = (sum(getattr(c, side) for c in counts) for side in ("shared", "unique"))
    return [s / max(u, 1e-12) for s, u in zip(shared.tolist(), unique.tolist(), strict=True)]


def _scaled_up(tasks: list[Task], settings: Settings, ratios: Sequence[float]) -> Vector:
    scales = [1 + settings["r"] * min(max(rho, 0.0), settings["alpha"]) for rho in ratios]
    return reduce_changed([t.vector for t in tasks], settings["epsilon"], scales).scaled(settings["lambda"])


def _ramplus_tl(tasks: list[Task], settings: Settings) -> Vector:
    return _scaled_up(tasks, settings, _ratios([count_overlap([t.vector for t in tasks], settings["epsilon"])]))


def _ramplus(tasks: list[Task], settings: Settings) -> Vector:
    return _scaled_up(tasks, settings, [settings["survey"][t.index] for t in tasks])


_RAM = {"lambda": Parameter(1.0), "epsilon": Parameter(1e-5, least=0, most=1e6)}
_RAMPLUS = {**_RAM, "r": Parameter(0.1, least=0), "alpha": Parameter(0.2, least=0)}
METHODS = (
    Method("ram", "Reinforced agent merging", "arXiv:2601.13572", "mergekit", _RAM, _ram),
    Method("ramplus", "RAM+", "arXiv:2601.13572", "", _RAMPLUS, _ramplus, survey=_ratios),
    Method("ramplus_tl", "RAM+, tensor by tensor", "arXiv:2601.13572", "mergekit", _RAMPLUS, _ramplus_tl),
)

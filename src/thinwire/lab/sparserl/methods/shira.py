"""Sparse high-rank adapters (Bhardwaj et al. 2024, arXiv:2406.13175): one cell in a hundred of each linear layer, drawn
at random, by PEFT."""

from __future__ import annotations

from typing import Any

from thinwire.lab.sparserl.adapters import attach, shira_rank
from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting

__all__ = ["DENSITY", "METHOD"]

DENSITY = 0.01


def _prepare(model: Any, setting: Setting) -> Prepared:
    rank = shira_rank(model, DENSITY)
    return attach("ShiraConfig", model, setting, r=rank, mask_type="random", random_seed=setting.seed)


METHOD = Method(
    about="about 1 % of the linear layers' cells, drawn at random (PEFT)",
    prepare=_prepare,
    lrs=(1e-3, 3e-3, 1e-2, 3e-2),
    source="arXiv:2406.13175, PEFT",
)

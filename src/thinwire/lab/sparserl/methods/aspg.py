"""Adaptive sparse policy gradients: the one weight in a hundred that matters most, chosen again every 16 steps."""

from __future__ import annotations

from typing import Any

from thinwire.lab.sparserl.methods.base import BETAS, Method, Prepared, Setting, prepared
from thinwire.optim import ASPG

__all__ = ["METHOD"]

_SETTINGS = {"density": 0.01, "refresh_every": 16, "warmup_steps": 2}


def _prepare(model: Any, setting: Setting) -> Prepared:
    def make(params: Any) -> ASPG:
        return ASPG(params, lr=setting.lr, betas=BETAS, weight_decay=0.0, **_SETTINGS)  # type: ignore[arg-type]

    return prepared(model, make, settings=_SETTINGS, density=_SETTINGS["density"])


METHOD = Method(
    about="the 1 % of all weights whose gradients matter most, chosen again every 16 steps (thinwire.optim.ASPG)",
    prepare=_prepare,
    lrs=(1e-4, 3e-4, 1e-3, 3e-3),
)

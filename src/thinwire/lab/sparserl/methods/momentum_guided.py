"""AdamW on those tensors whose momentum has a direction (thinwire.optim.MomentumGuided); the others rest."""

from __future__ import annotations

from typing import Any

from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting, adamw, prepared
from thinwire.optim import MomentumGuided

__all__ = ["METHOD"]

_SETTINGS = {"freeze_below": 0.3, "every": 8, "probe_every": 4, "jump": 2.0}


def _prepare(model: Any, setting: Setting) -> Prepared:
    def make(params: Any) -> MomentumGuided:
        return MomentumGuided(
            adamw(params, setting.lr), freeze_below=0.3, every=8, probe_every=4, jump=2.0
        )  # fmt: skip

    return prepared(model, make, settings=_SETTINGS)


METHOD = Method(
    about="all weights but those of tensors whose momentum has no direction, decided every 8 steps",
    prepare=_prepare,
    lrs=(3e-5, 1e-4, 3e-4, 1e-3),
)

"""A method of SparseRL in one file: ASPG that chooses 1 % of each tensor, not of all of them together.

thinwire bench sparserl --suite small --methods examples/sparserl/aspg_each_tensor.py
"""

from __future__ import annotations

from typing import Any

from thinwire.lab.sparserl.methods.base import BETAS, Method, Prepared, Setting, prepared
from thinwire.optim import ASPG

SETTINGS = {"density": 0.01, "refresh_every": 16, "warmup_steps": 2, "scope": "tensor"}


def prepare(model: Any, setting: Setting) -> Prepared:
    def make(params: Any) -> ASPG:
        return ASPG(params, lr=setting.lr, betas=BETAS, weight_decay=0.0, **SETTINGS)  # type: ignore[arg-type]

    return prepared(model, make, settings=SETTINGS, density=0.01)


METHOD = Method(
    about="the 1 % of each tensor whose gradients matter most, chosen again every 16 steps (thinwire.optim.ASPG)",
    prepare=prepare,
    lrs=(3e-4, 1e-3, 3e-3, 1e-2),
)

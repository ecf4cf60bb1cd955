"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) in all linear layers, by PEFT."""

from __future__ import annotations

from typing import Any

from thinwire.lab.sparserl.adapters import attach
from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting

__all__ = ["METHOD"]


def _prepare(model: Any, setting: Setting) -> Prepared:
    return attach("LoraConfig", model, setting, r=8, lora_alpha=16, lora_dropout=0.0)


METHOD = Method(
    about="rank 8 in all linear layers (PEFT)",
    prepare=_prepare,
    lrs=(3e-4, 1e-3, 3e-3, 1e-2),
    source="arXiv:2106.09685, PEFT",
)

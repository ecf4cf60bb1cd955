"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): embeddings of eight virtual tokens, by PEFT."""

from __future__ import annotations

from typing import Any

from thinwire.lab.sparserl.adapters import attach_prompt
from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting

__all__ = ["METHOD"]


def _prepare(model: Any, setting: Setting) -> Prepared:
    return attach_prompt("PromptTuningConfig", model, setting, num_virtual_tokens=8)


METHOD = Method(
    about="embeddings of 8 virtual tokens (PEFT)",
    prepare=_prepare,
    lrs=(1e-2, 3e-2, 1e-1, 3e-1),
    source="arXiv:2104.08691, PEFT",
)

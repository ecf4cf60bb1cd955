"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): keys and values of eight virtual tokens, by PEFT."""

from __future__ import annotations

from typing import Any

from thinwire.lab.sparserl.adapters import attach_prompt
from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting

__all__ = ["METHOD"]


def _prepare(model: Any, setting: Setting) -> Prepared:
    return attach_prompt("PrefixTuningConfig", model, setting, num_virtual_tokens=8)


METHOD = Method(
    about="keys and values of 8 virtual tokens (PEFT)",
    prepare=_prepare,
    lrs=(3e-3, 1e-2, 3e-2, 1e-1),
    source="arXiv:2101.00190, PEFT",
)

"""One weight in a hundred, drawn at random before the first step: what a sparse method has to beat."""

from __future__ import annotations

from typing import Any

from thinwire.lab.sparserl.masked import masked
from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting

__all__ = ["DENSITY", "METHOD"]

DENSITY = 0.01


def _prepare(model: Any, setting: Setting) -> Prepared:
    return masked(model, setting, DENSITY)


METHOD = Method(
    about="1 % of all weights, drawn at random and kept, AdamW", prepare=_prepare, lrs=(1e-3, 3e-3, 1e-2, 3e-2)
)

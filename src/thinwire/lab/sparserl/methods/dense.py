"""All weights, by AdamW: what every other method is held against."""

from __future__ import annotations

from typing import Any

from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting, adamw, prepared

__all__ = ["METHOD"]


def _prepare(model: Any, setting: Setting) -> Prepared:
    return prepared(model, lambda params: adamw(params, setting.lr))


METHOD = Method(
    about="all weights, AdamW", prepare=_prepare, lrs=(3e-5, 1e-4, 3e-4, 1e-3), source="Loshchilov and Hutter 2019"
)

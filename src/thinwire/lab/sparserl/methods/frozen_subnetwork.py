"""A subnetwork of one weight in a hundred, found in four steps that move nothing, and kept.

Reinforcement learning is said to change a small subnetwork of a model (Mukherjee et al. 2025, arXiv:2505.11711). Here
it is where the squared gradients of the first four batches are largest; these steps count as the run's.
"""

from __future__ import annotations

from typing import Any

from thinwire.lab.sparserl.masked import masked
from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting

__all__ = ["METHOD"]

_DENSITY, _PILOT = 0.01, 4


def _prepare(model: Any, setting: Setting) -> Prepared:
    return masked(model, setting, _DENSITY, pilot=_PILOT)


METHOD = Method(
    about="the 1 % of all weights with the largest gradients in 4 steps that move nothing, kept from then on, AdamW",
    prepare=_prepare,
    lrs=(1e-4, 3e-4, 1e-3, 3e-3),
    source="arXiv:2505.11711",
)

"""Selection of the largest magnitudes by torch's own operations, on any device: the fall-back of the fast versions.

Several passes over memory and a few waits for the device, but no sort of everything.
"""

from __future__ import annotations

import torch

from thinwire.tensors import select_oracle
from thinwire.tensors.select_bound import INFINITY

__all__ = ["accumulate", "at_least", "top_k"]

Found = tuple[torch.Tensor, int, bool]
"""Sorted int32 indices, the key of the smallest one selected, and whether all values are finite."""


def top_k(x: torch.Tensor, k: int) -> Found:
    """The ``k`` largest magnitudes of a 1-d tensor, ties to the lowest indices."""
    keys = select_oracle.keys(x)
    largest = int(keys.max()) if keys.numel() else 0
    if k == 0:
        return torch.empty(0, dtype=torch.int32, device=x.device), INFINITY, largest < INFINITY
    key = int(torch.topk(keys, k, sorted=False).values.min())
    above = torch.nonzero(keys > key).flatten()
    equal = torch.nonzero(keys == key).flatten()[: k - above.numel()]
    return torch.cat((above, equal)).sort().values.int(), key, largest < INFINITY


def accumulate(
    gradient: torch.Tensor, residual: torch.Tensor, out: torch.Tensor, scale: float, keep: float
) -> torch.Tensor:
    """``out = scale * gradient + keep * residual``."""
    return out.copy_(select_oracle.accumulate(gradient, residual, scale, keep))


def at_least(x: torch.Tensor, threshold: float, cap: int | None) -> torch.Tensor:
    """Sorted int32 indices of all magnitudes >= ``threshold``; of the ``cap`` largest if there are more."""
    found = select_oracle.at_least(x, threshold)
    return found if cap is None or found.numel() <= cap else top_k(x, cap)[0]

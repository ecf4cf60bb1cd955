"""The readable definition of selection by magnitude; every fast version must equal it.

It sorts everything, on whatever device the tensor is.
"""

from __future__ import annotations

import torch

__all__ = ["accumulate", "at_least", "keys", "top_k"]


def keys(x: torch.Tensor) -> torch.Tensor:
    """The bits of ``|x|`` as int32: they order as magnitudes do, with NaN above infinity.

    >>> keys(torch.tensor([-1.0, 1.0, 2.0])).tolist()
    [1065353216, 1065353216, 1073741824]
    """
    return x.float().view(torch.int32) & 0x7FFF_FFFF


def top_k(x: torch.Tensor, k: int) -> torch.Tensor:
    """Sorted int32 indices of the ``k`` largest magnitudes of a 1-d tensor; among equals the lowest indices.

    >>> top_k(torch.tensor([1.0, -3.0, 2.0, -1.0]), 3).tolist()
    [0, 1, 2]
    """
    order = torch.sort(keys(x), descending=True, stable=True).indices
    return order[:k].sort().values.int()


def at_least(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Sorted int32 indices of all magnitudes that are not below ``threshold``; NaN is not.

    >>> at_least(torch.tensor([1.0, -3.0, float("nan")]), 2.0).tolist()
    [1, 2]
    """
    return torch.nonzero(~(x.float().abs() < threshold)).flatten().int()


def accumulate(
    gradient: torch.Tensor, residual: torch.Tensor, gradient_scale: float = 1.0, residual_scale: float = 1.0
) -> torch.Tensor:
    """``gradient_scale * gradient + residual_scale * residual`` in float32: two products, each rounded, then the sum.

    >>> accumulate(torch.tensor([1.0]), torch.tensor([2.0]), 0.5, 2.0).tolist()
    [4.5]
    """
    return gradient.float() * gradient_scale + residual.float() * residual_scale

"""Parameters and gradients as flat tensors in the order of memory, without copies of parameters."""

from __future__ import annotations

from typing import Any

import torch

from thinwire.errors import MisuseError

__all__ = ["flat_pair", "local"]


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    whole: Any = x
    found: torch.Tensor = whole.to_local() if hasattr(whole, "to_local") else x
    return found.detach()


def flat_pair(weights: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [n] of both, the weights' own memory; a gradient that lies otherwise is copied.

    Raises:
        MisuseError: the weights have gaps or overlap in memory.

    >>> a = torch.arange(6.0).view(2, 3).t()
    >>> flat_pair(a, a.contiguous())[1]
    tensor([0., 1., 2., 3., 4., 5.])
    """
    if weights.is_contiguous():
        return weights.view(-1), gradient.contiguous().view(-1)
    size = weights.numel()
    spans = sum((n - 1) * s for n, s in zip(weights.shape, weights.stride(), strict=True)) + 1
    same = torch.empty_like(weights, dtype=gradient.dtype)  # keeps strides only where memory is dense
    if spans != size or same.stride() != weights.stride():
        raise MisuseError("a parameter has gaps in memory; make it contiguous")
    laid = gradient if gradient.stride() == weights.stride() else same.copy_(gradient)
    return weights.as_strided((size,), (1,)), laid.as_strided((size,), (1,))

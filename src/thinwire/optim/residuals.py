"""Error feedback of a sparse step: what was not applied of a gradient waits in a residual, and is added to the next.

Seide et al. (2014) and Stich et al. (arXiv:1809.07599); what it proves is in docs/theory.md. The law is that of every
compressor of thinwire: ``sum(applied) + residual == sum(gradients)``, to the rounding of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thinwire.errors import RefuseError

__all__ = ["DTYPES", "accumulate", "check_sums", "take_out"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _largest(x: torch.Tensor) -> float:
    if x.numel() == 0:
        return 0.0
    return float(torch.linalg.vector_norm(x, float("inf")))


def check_sums(gradients: Sequence[torch.Tensor], residuals: Sequence[torch.Tensor | None]) -> None:
    """That no sum of a gradient and its residual can be infinite or NaN; reads only.

    Raises:
        RefuseError: one could; where any cell is bad, all that waits would be.
    """
    for gradient, residual in zip(gradients, residuals, strict=True):
        waiting = 0.0 if residual is None else _largest(residual)
        room = torch.finfo(torch.float32 if residual is None else residual.dtype).max * 0.99
        if not _largest(gradient) + waiting < room:
            raise RefuseError("a gradient is infinite or NaN; nothing was changed. Skip this step, or clip before")


def accumulate(gradient: torch.Tensor, residual: torch.Tensor | None, dtype: str) -> torch.Tensor:
    """``residual += gradient`` [n], rounded to the residual's data type; a new one where there was none.

    >>> accumulate(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), "float32")
    tensor([1.5000, 2.0000])
    """
    if residual is None:
        return gradient.to(DTYPES[dtype], copy=True)
    return residual.add_(gradient)


def take_out(residual: torch.Tensor, positions: torch.Tensor) -> None:
    """Zero what has been applied.

    >>> residual = torch.ones(3)
    >>> take_out(residual, torch.tensor([1], dtype=torch.int32))
    >>> residual
    tensor([1., 0., 1.])
    """
    residual.index_fill_(0, positions.long(), 0)

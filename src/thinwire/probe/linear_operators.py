"""A curvature matrix as a linear operator of curvlinops (Dangel et al. 2025, arXiv:2501.19183), for its estimators.

The extra needs ``curvlinops-for-pytorch``. What curvlinops adds to :func:`thinwire.probe.curvature.curvature`: XTrace,
spectral densities, diagonals, inverses. Its own Hessians take forward derivatives, which differ from the gradients that
training uses where an embedding has a ``padding_idx``, and are slower to be had for a policy's objective; so products
are ours.

Example (needs curvlinops)::

    matrix = CurvatureOperator(model, objective, batches)
    trace = curvlinops.xtrace(linear_operator(matrix), num_matvecs=40)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.probe.curvature import CurvatureOperator

__all__ = ["linear_operator"]


def linear_operator(matrix: CurvatureOperator) -> Any:
    """``matrix`` as a self-adjoint ``curvlinops`` linear operator on float32 CPU tensors, [size] or lists by weight.

    Raises:
        MisuseError: curvlinops is not installed.
    """
    try:
        from curvlinops._torch_base import PyTorchLinearOperator  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise MisuseError(
            "linear operators need curvlinops: pip install 'thinwire[curvature]' (on a machine without a torchvision "
            "that fits its torch: pip install --no-deps curvlinops-for-pytorch einconv linear_operator einops "
            "opt-einsum)"
        ) from error

    class Operator(PyTorchLinearOperator):  # type: ignore[misc, unused-ignore]
        SELF_ADJOINT = True

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            columns = torch.cat([part.reshape(-1, part.shape[-1]) for part in X])
            found = torch.stack([matrix.product(column) for column in columns.T], dim=1)
            pieces = torch.split(found, [part.shape[:-1].numel() for part in X])
            return [piece.reshape(part.shape) for piece, part in zip(pieces, X, strict=True)]

        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

        @property
        def dtype(self) -> torch.dtype:
            return torch.float32

    shapes = list(matrix.shapes.values())
    return Operator(shapes, shapes)

"""The sparse delta of one tensor: where a fine-tune differs from its base, and both values there, as exact bits.

A task vector is ``new - base`` (Ilharco et al. 2022, arXiv:2212.04089). A fine-tune in bf16 leaves most weights as
they are, so that its task vector is sparse; but a *difference* in bf16 is rounded, and adding it back is wrong in some
of the weights. So both values are kept as cells, and what is computed with is
:meth:`TensorDelta.differences`, in float32.

>>> base = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
>>> delta = delta_between(base, torch.tensor([1.0, 2.5, 3.0], dtype=torch.bfloat16))
>>> delta.positions.tolist(), delta.differences().tolist(), delta.size
([1], [0.5], 3)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from thinwire.errors import MalformedError, MisuseError, WrongBaseError
from thinwire.tensors.bits import cells_of, dtype_of_tensor, shape_of, tensor_of, torch_dtype
from thinwire.wire.spec import cell_count, dtype_of

__all__ = ["MERGEABLE", "TensorDelta", "cells_from", "delta_between", "delta_of_cells", "floats_of", "work_dtype"]

Cells = npt.NDArray[np.unsignedinteger]
Positions = npt.NDArray[np.signedinteger]
Floats = npt.NDArray[np.floating]

MERGEABLE = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
"""Data types whose values can be averaged. Others (indices, masks, packed weights) only travel unchanged."""

_INT32_CELLS = 1 << 31
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def work_dtype(dtype: str) -> torch.dtype:
    """What is computed in: float64 for F64, float32 for all other floats, as mergekit does with ``dtype: float32``.

    Raises:
        MisuseError: values of this data type cannot be averaged.
    """
    if dtype not in MERGEABLE:
        raise MisuseError(f"{dtype} holds no numbers to merge; known are {', '.join(MERGEABLE)}", dtype=dtype)
    return torch.float64 if dtype == "F64" else torch.float32


def floats_of(cells: Cells, dtype: str) -> Floats:
    """The numbers in cells, exactly: float64 for F64, float32 for all others.

    In NumPy where it has the type: torch wakes all its threads for arrays this small, and on a busy machine waits for
    them longer than the work takes.

    Raises:
        MisuseError: values of this data type cannot be averaged.
    """
    if dtype == "BF16":
        wide: Floats = (cells.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide
    if dtype in _NUMPY:
        return cells.view(_NUMPY[dtype]).astype(np.float64 if dtype == "F64" else np.float32)
    found: Floats = tensor_of(cells, dtype, (cells.size,)).to(work_dtype(dtype)).numpy()
    return found


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """Where a tensor differs in any bit from its base's.

    Attributes:
        dtype: safetensors' name of the data type of both tensors, such as ``BF16``.
        shape: of the whole tensor.
        positions: flat positions [changed], strictly increasing; int32, or int64 where the tensor has 2^31 cells.
        base: the base's cells at these positions [changed], unsigned integers that hold the exact bits.
        new: the fine-tune's cells there [changed], each different from its base's.
    """

    dtype: str
    shape: tuple[int, ...]
    positions: Positions
    base: Cells
    new: Cells

    @property
    def size(self) -> int:
        """Cells of the whole tensor, changed or not."""
        return cell_count(dtype_of(self.dtype), self.shape)

    @property
    def changed(self) -> int:
        """Cells that differ."""
        return int(self.positions.size)

    def differences(self) -> Floats:
        """``new - base`` at the positions [changed], in float32 (float64 for F64). -0.0 against 0.0 is a change of 0.

        Raises:
            MisuseError: no data type of numbers.
        """
        return floats_of(self.new, self.dtype) - floats_of(self.base, self.dtype)

    def values(self, cells: Cells) -> torch.Tensor:
        """Cells of this delta (``base`` or ``new``) as a tensor [changed] of its data type, for scatters on a device.

        Raises:
            UnsupportedError: this torch release lacks the data type.
        """
        return tensor_of(cells, self.dtype, (cells.size,))

    def check(self) -> TensorDelta:
        """Itself, if it is as described: for deltas that were not made here.

        Raises:
            MalformedError: wrong types or lengths, positions out of order or of bounds, cells that do not differ.
        """
        kind = dtype_of(self.dtype).cells
        lengths = {self.positions.size, self.base.size, self.new.size}
        if self.positions.dtype not in (np.int32, np.int64) or {self.base.dtype, self.new.dtype} != {kind}:
            raise MalformedError(f"a delta of {self.dtype} has int32 or int64 positions and cells of {kind}")
        if len(lengths) > 1 or any(a.ndim != 1 for a in (self.positions, self.base, self.new)):
            raise MalformedError("a delta's positions and cells are 1-d and of one length")
        if self.changed and not (self.positions[0] >= 0 and self.positions[-1] < self.size):
            raise MalformedError(f"a delta's positions leave the tensor of {self.size} cells")
        if (self.positions[1:] <= self.positions[:-1]).any() or (self.base == self.new).any():
            raise MalformedError("a delta's positions increase strictly, and its cells differ from the base's")
        return self

    def written_to(self, cells: Cells) -> Cells:
        """``cells``, all of a tensor's and writable, with ``new`` at the positions, after checking that they hold
        ``base`` there.

        Raises:
            WrongBaseError: they are not the base's; nothing was written.
        """
        if cells.size != self.size or not np.array_equal(cells[self.positions], self.base):
            raise WrongBaseError("these are not the cells that the delta was made from")
        cells[self.positions] = self.new
        return cells


def delta_of_cells(
    dtype: str, shape: tuple[int, ...], positions: npt.NDArray[np.integer], base: Cells, new: Cells
) -> TensorDelta:
    """A delta from positions and cells, cells that do not differ left out."""
    kind = np.int32 if cell_count(dtype_of(dtype), shape) < _INT32_CELLS else np.int64
    differ = base != new
    if differ.all():
        return TensorDelta(dtype, shape, positions.astype(kind, copy=False), base, new)
    return TensorDelta(dtype, shape, positions[differ].astype(kind, copy=False), base[differ], new[differ])


def delta_between(base: torch.Tensor, new: torch.Tensor) -> TensorDelta:
    """The delta from one dense tensor to another.

    Raises:
        MisuseError: their data types or shapes differ.
        UnsupportedError: safetensors has no such data type.
    """
    if base.dtype != new.dtype or base.shape != new.shape:
        raise MisuseError(
            f"the base is {base.dtype} {tuple(base.shape)}, the fine-tune {new.dtype} {tuple(new.shape)}; "
            "convert one of them first"
        )
    old, now = cells_of(base), cells_of(new)
    positions = np.flatnonzero(old != now)
    return delta_of_cells(dtype_of_tensor(base).name, shape_of(base), positions, old[positions], now[positions])


def cells_from(values: Floats, dtype: str) -> Cells:
    """Numbers of the data type's work type rounded (to nearest, ties to even) to it, as cells; torch's bits for all
    numbers but NaN."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded: Cells = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
        return rounded
    if dtype in _NUMPY:
        with np.errstate(over="ignore"):
            return values.astype(_NUMPY[dtype]).view(dtype_of(dtype).cells)
    return cells_of(torch.from_numpy(values).to(torch_dtype(dtype)))

"""Diff and apply in torch, on whatever device the tensors are; the same answer as the kernels, bit for bit.

Cells appear as signed integers here, since torch's unsigned ones lack most operations; the bits are the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from thinwire.tensors.bits import dtype_of_tensor

__all__ = ["bits_of", "find_changed", "scatter_", "step_codes", "unstep"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's cells as a flat view of int16, int32, int64 or uint8, on its device."""
    plain = tensor.detach()
    if plain.dtype == torch.bool:
        plain = plain.view(torch.uint8)
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.reshape(-1).view(_INTEGERS[dtype_of_tensor(tensor).cell_bytes])


def _ordered(cells: torch.Tensor, width: int, is_float: bool) -> torch.Tensor:
    wide = cells.to(torch.int64)
    if width == 1:
        wide = wide - ((wide >> 7) << 8)  # torch has no signed view of what bool and float8 become
    return wide ^ ((wide >> 63) & ((1 << (8 * width - 1)) - 1)) if is_float else wide


def _wrapped(values: torch.Tensor, width: int) -> torch.Tensor:
    spare = 64 - 8 * width
    return (values << spare) >> spare


def step_codes(old: torch.Tensor, new: torch.Tensor, *, width: int, is_float: bool) -> torch.Tensor:
    """Zigzag-coded steps between cells (as :func:`bits_of` gives them), int64; the low ``8 * width`` bits count."""
    step = _wrapped(_ordered(new, width, is_float) - _ordered(old, width, is_float), width)
    code = (step << 1) ^ (step >> 63)
    return code if width == 8 else code & ((1 << (8 * width)) - 1)


def unstep(old: torch.Tensor, codes: torch.Tensor, *, width: int, is_float: bool) -> torch.Tensor:
    """The inverse of :func:`step_codes`: new cells in the integer type of ``old``."""
    magnitude = (codes >> 1) & ((1 << (8 * width - 1)) - 1)
    moved = _wrapped(_ordered(old, width, is_float) + (magnitude ^ -(codes & 1)), width)
    cells = moved ^ ((moved >> 63) & ((1 << (8 * width - 1)) - 1)) if is_float else moved
    return (cells & 255).to(torch.uint8) if width == 1 else cells.to(old.dtype)


def find_changed(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions (int64) at which two contiguous tensors differ in any bit, and the steps there (int64).

    >>> positions, codes = find_changed(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    >>> positions.tolist(), codes.tolist()
    ([0], [1])
    """
    kind = dtype_of_tensor(old)
    before, after = bits_of(old), bits_of(new)
    positions = torch.nonzero(before != after).reshape(-1)
    codes = step_codes(before[positions], after[positions], width=kind.cell_bytes, is_float=kind.is_float)
    return positions, codes


def scatter_(tensor: torch.Tensor, positions: npt.NDArray[np.int64], cells: npt.NDArray[np.unsignedinteger]) -> None:
    """Write ``cells`` at flat ``positions`` of a contiguous tensor, in place; only these cross to the device."""
    bits = bits_of(tensor)
    source = torch.from_numpy(cells.view(f"i{cells.itemsize}") if cells.itemsize > 1 else cells)
    where = torch.from_numpy(positions)
    bits.index_copy_(0, where.to(tensor.device), source.to(tensor.device))

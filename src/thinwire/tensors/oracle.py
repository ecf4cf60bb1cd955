"""The readable versions of the kernels: plain Python and torch, no speed. The tests require equality bit for bit."""

from __future__ import annotations

import torch

from thinwire.tensors.bits import cells_of

__all__ = ["apply_absolute", "apply_steps", "changed_positions", "ordered", "steps"]


def ordered(cell: int, bits: int, *, is_float: bool) -> int:
    """A cell as an integer in numeric order: two's complement, with the magnitude of negative floats flipped."""
    signed = cell - (1 << bits) if cell >> (bits - 1) else cell
    if is_float and signed < 0:
        signed ^= (1 << (bits - 1)) - 1
    return signed


def _unordered(value: int, bits: int, *, is_float: bool) -> int:
    value = (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))  # wrap into the signed range
    if is_float and value < 0:
        value ^= (1 << (bits - 1)) - 1
    return value % (1 << bits)


def changed_positions(old: torch.Tensor, new: torch.Tensor) -> list[int]:
    """Flat positions at which two tensors of one dtype and shape differ in any bit."""
    pairs = zip(cells_of(old).tolist(), cells_of(new).tolist(), strict=True)
    return [i for i, (a, b) in enumerate(pairs) if a != b]


def steps(old: list[int], new: list[int], bits: int, *, is_float: bool) -> list[int]:
    """Zigzag-coded steps between cells, modulo ``2**bits``."""
    codes = []
    for a, b in zip(old, new, strict=True):
        difference = ordered(b, bits, is_float=is_float) - ordered(a, bits, is_float=is_float)
        difference = (difference + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
        codes.append(2 * difference if difference >= 0 else -2 * difference - 1)
    return codes


def apply_steps(old: list[int], codes: list[int], bits: int, *, is_float: bool) -> list[int]:
    """The inverse of :func:`steps`."""
    cells = []
    for a, code in zip(old, codes, strict=True):
        difference = code // 2 if code % 2 == 0 else -(code + 1) // 2
        cells.append(_unordered(ordered(a, bits, is_float=is_float) + difference, bits, is_float=is_float))
    return cells


def apply_absolute(cells: list[int], positions: list[int], new: list[int]) -> list[int]:
    """``cells`` with ``new`` at ``positions``."""
    result = list(cells)
    for position, cell in zip(positions, new, strict=True):
        result[position] = cell
    return result

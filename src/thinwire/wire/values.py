"""How a changed cell's value is written: as a step in numeric order (``ulp``), or as it is (``absolute``).

``ulp``: the bit pattern of a float, read as a signed integer with the magnitude bits of negative numbers flipped,
orders like the number (:func:`ordered`). A change is the difference of two such integers modulo ``2**bits``, so it is
exact for every pattern (NaN payloads, -0.0, infinities), and a rounding step of one unit in the last place is +1 or -1.
Integers need no flip. Steps are zigzag-coded: 0, -1, 1, -2, ... become 0, 1, 2, 3, ...

``absolute``: the new cell, rotated left by one for floats so that the sign does not part the exponents.

>>> import numpy as np
>>> old, new = np.array([1.0, -0.0], np.float16), np.array([1.001, 0.0], np.float16)
>>> steps(old.view(np.uint16), new.view(np.uint16), is_float=True).tolist()  # +1 ULP each
[2, 2]
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["apply_steps", "flip_mask", "ordered", "rotate_left", "rotate_right", "step_of", "steps", "unstep"]

Cells = npt.NDArray[np.unsignedinteger]


def flip_mask(is_float: bool, cell_bytes: int) -> int:
    """Magnitude bits of a float's cell; 0 for integers."""
    return (1 << (8 * cell_bytes - 1)) - 1 if is_float else 0


@njit(nogil=True, cache=True, inline="always")
def ordered(cell, flip, spare):
    """A cell as a signed integer in numeric order. ``spare`` is 64 minus the cell's bits. Its own inverse."""
    signed = (np.int64(cell) << spare) >> spare
    return signed ^ ((signed >> 63) & flip)


@njit(nogil=True, cache=True, inline="always")
def step_of(old, new, flip, spare):
    """Zigzag-coded step from ``old`` to ``new``; only the cell's low bits of the result count."""
    difference = ((ordered(new, flip, spare) - ordered(old, flip, spare)) << spare) >> spare
    return (difference << 1) ^ (difference >> 63)


@njit(nogil=True, cache=True, inline="always")
def unstep(old, step, flip, spare):
    """The new cell; only its low bits count."""
    code = np.uint64(step)
    difference = np.int64(code >> np.uint64(1)) ^ -np.int64(code & np.uint64(1))
    moved = ((ordered(old, flip, spare) + difference) << spare) >> spare
    return moved ^ ((moved >> 63) & flip)


@njit(nogil=True, cache=True)
def _steps(old, new, flip, spare, out):
    for i in range(old.shape[0]):
        out[i] = step_of(old[i], new[i], flip, spare)


@njit(nogil=True, cache=True)
def _apply_steps(old, codes, flip, spare, out):
    for i in range(old.shape[0]):
        out[i] = unstep(old[i], codes[i], flip, spare)


def steps(old: Cells, new: Cells, *, is_float: bool) -> Cells:
    """Zigzag-coded steps from ``old`` to ``new``: arrays of one unsigned dtype and length."""
    out = np.empty_like(new)
    _steps(old, new, flip_mask(is_float, old.itemsize), 64 - 8 * old.itemsize, out)
    return out


def apply_steps(old: Cells, codes: Cells, *, is_float: bool) -> Cells:
    """The inverse of :func:`steps`: ``apply_steps(old, steps(old, new)) == new`` for all bit patterns."""
    out = np.empty_like(old)
    _apply_steps(old, codes, flip_mask(is_float, old.itemsize), 64 - 8 * old.itemsize, out)
    return out


def rotate_left(cells: Cells, *, is_float: bool) -> Cells:
    """Float cells with the sign moved to the lowest bit; integers as they are."""
    if not is_float:
        return cells
    top = cells.dtype.type(8 * cells.itemsize - 1)
    one = cells.dtype.type(1)
    return (cells << one) | (cells >> top)


def rotate_right(cells: Cells, *, is_float: bool) -> Cells:
    """The inverse of :func:`rotate_left`."""
    if not is_float:
        return cells
    top = cells.dtype.type(8 * cells.itemsize - 1)
    one = cells.dtype.type(1)
    return (cells >> one) | (cells << top)

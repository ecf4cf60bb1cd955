"""Diff and apply over arrays of cells, at memory speed on the CPU.

The readable versions are in :mod:`thinwire.tensors.oracle`; the tests require equality bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from thinwire.wire.values import flip_mask, step_of, unstep
from thinwire.wire.vector import LANES, differing_lanes, prefetch, trailing_zeros

__all__ = ["advance", "count_changed", "find_changed", "swap_absolute", "swap_steps", "take_changed"]

Cells = npt.NDArray[np.unsignedinteger]
Positions = npt.NDArray[np.uint32]

_AHEAD = 64  # changes: sparse ones lie too far apart for the processor to fetch them ahead by itself


@njit(nogil=True, cache=True)
def _differing(old, new, start, count):
    if count == LANES:
        return differing_lanes(old, new, start)
    mask = np.uint64(0)
    for j in range(count):
        if old[start + j] != new[start + j]:
            mask |= np.uint64(1) << np.uint64(j)
    return mask


@njit(nogil=True, cache=True)
def _find(old, new, offset, flip, spare, absolute, positions, codes, found):
    n = old.shape[0]
    for start in range(0, n, LANES):
        lanes = _differing(old, new, start, min(LANES, n - start))
        while lanes != np.uint64(0):
            i = start + trailing_zeros(lanes)
            lanes &= lanes - np.uint64(1)
            positions[found] = offset + i
            codes[found] = np.int64(new[i]) if absolute else step_of(old[i], new[i], flip, spare)
            found += 1
    return found


@njit(nogil=True, cache=True)
def _take(old, new, offset, flip, spare, absolute, positions, codes, found):  # _find's old may be read-only
    n = old.shape[0]
    for start in range(0, n, LANES):
        lanes = _differing(old, new, start, min(LANES, n - start))
        while lanes != np.uint64(0):
            i = start + trailing_zeros(lanes)
            lanes &= lanes - np.uint64(1)
            after = new[i]  # read once: should it change meanwhile, the code and the cell still agree
            positions[found] = offset + i
            codes[found] = np.int64(after) if absolute else step_of(old[i], after, flip, spare)
            old[i] = after
            found += 1
    return found


@njit(nogil=True, cache=True)
def _count(old, new):
    n = old.shape[0]
    changed = 0
    for i in range(n):
        changed += old[i] != new[i]
    return changed


@njit(nogil=True, cache=True)
def _advance(cells, offset, flip, spare, absolute, positions, codes, first, last):
    for k in range(first, last):
        i = np.int64(positions[k]) - offset
        if absolute:
            cells[i] = codes[k]
        else:
            cells[i] = unstep(cells[i], codes[k], flip, spare)


@njit(nogil=True, cache=True)
def _swap_steps(cells, offset, flip, spare, positions, codes, first):
    stop = offset + cells.shape[0]
    last = positions.shape[0] - 1
    k = first
    while k <= last and np.int64(positions[k]) < stop:
        ahead = min(k + _AHEAD, last)
        prefetch(cells, np.int64(positions[ahead]) - offset)
        i = np.int64(positions[k]) - offset
        old = cells[i]
        cells[i] = unstep(old, codes[k], flip, spare)
        codes[k] = old
        k += 1
    return k


@njit(nogil=True, cache=True)
def _swap_absolute(cells, offset, positions, codes, first):
    stop = offset + cells.shape[0]
    last = positions.shape[0] - 1
    k = first
    while k <= last and np.int64(positions[k]) < stop:
        ahead = min(k + _AHEAD, last)
        prefetch(cells, np.int64(positions[ahead]) - offset)
        i = np.int64(positions[k]) - offset
        old = cells[i]
        cells[i] = codes[k]
        codes[k] = old
        k += 1
    return k


def find_changed(
    old: Cells, new: Cells, offset: int, positions: Positions, codes: Cells, found: int, *, is_float: bool, values: str
) -> int:
    """Append the changes from ``old`` to ``new`` (1-d, one length) to ``positions`` and ``codes`` from ``found`` on.

    A change at index ``i`` is written as position ``offset + i``. The two output arrays must have room for
    ``old.size`` more. Returns the new count.
    """
    flip, spare = flip_mask(is_float, old.itemsize), 64 - 8 * old.itemsize
    return int(_find(old, new, offset, flip, spare, values == "absolute", positions, codes, found))


def take_changed(
    old: Cells, new: Cells, offset: int, positions: Positions, codes: Cells, found: int, *, is_float: bool, values: str
) -> int:
    """:func:`find_changed` and :func:`advance` in one pass: ``old`` becomes ``new`` while it is in cache."""
    flip, spare = flip_mask(is_float, old.itemsize), 64 - 8 * old.itemsize
    return int(_take(old, new, offset, flip, spare, values == "absolute", positions, codes, found))


def count_changed(old: Cells, new: Cells) -> int:
    """Number of cells that differ."""
    return int(_count(old, new))


def advance(
    cells: Cells, offset: int, positions: Positions, codes: Cells, first: int, last: int, *, is_float: bool, values: str
) -> None:
    """Apply the changes ``first:last``, all of which must lie in ``cells``; ``codes`` stay as they are."""
    flip, spare = flip_mask(is_float, cells.itemsize), 64 - 8 * cells.itemsize
    _advance(cells, offset, flip, spare, values == "absolute", positions, codes, first, last)


def swap_steps(cells: Cells, offset: int, positions: Positions, codes: Cells, first: int, *, is_float: bool) -> int:
    """Apply the steps from ``first`` on that lie in ``cells``, leaving the overwritten cells in ``codes``.

    Positions must increase strictly and be at least ``offset``. Returns the index of the first change behind ``cells``.
    """
    flip, spare = flip_mask(is_float, cells.itemsize), 64 - 8 * cells.itemsize
    return int(_swap_steps(cells, offset, flip, spare, positions, codes, first))


def swap_absolute(cells: Cells, offset: int, positions: Positions, codes: Cells, first: int) -> int:
    """Like :func:`swap_steps`, for codes that are new cells. Applied twice it restores the first state."""
    return int(_swap_absolute(cells, offset, positions, codes, first))

"""Two lists of changes into one: steps at the same cell add up, of new cells the later one wins.

The readable version, over dictionaries, is in the tests, which require equality.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["merge_changes"]

Cells = npt.NDArray[np.unsignedinteger]
Positions = npt.NDArray[np.int64]


@njit(nogil=True, cache=True, inline="always")
def _signed(code: Any) -> Any:
    """The step of a zigzag code."""
    wide = np.uint64(code)
    return np.int64(wide >> np.uint64(1)) ^ -np.int64(wide & np.uint64(1))


@njit(nogil=True, cache=True)
def _merge(
    first: Any, first_codes: Any, second: Any, second_codes: Any, absolute: bool, spare: int, positions: Any, codes: Any
) -> Any:
    a = b = found = 0
    while a < first.shape[0] or b < second.shape[0]:
        if b == second.shape[0] or (a < first.shape[0] and first[a] < second[b]):
            positions[found] = first[a]
            codes[found] = first_codes[a]
            a += 1
        elif a == first.shape[0] or second[b] < first[a]:
            positions[found] = second[b]
            codes[found] = second_codes[b]
            b += 1
        else:
            positions[found] = second[b]
            codes[found] = second_codes[b]
            a += 1
            b += 1
            if not absolute:
                step = ((_signed(first_codes[a - 1]) + _signed(second_codes[b - 1])) << spare) >> spare
                if step == 0:
                    continue
                codes[found] = (step << 1) ^ (step >> 63)
        found += 1
    return found


def merge_changes(
    first: Positions, first_codes: Cells, second: Positions, second_codes: Cells, *, absolute: bool
) -> tuple[Positions, Cells]:
    """The changes ``first`` and after them ``second``, of one tensor, as one list.

    Positions (int64) increase strictly in both; codes (one cell type) are zigzag steps, or new cells if ``absolute``.
    Steps are added modulo the cell's width; cells that come back to where they were drop out. Linear in the changes.

    >>> import numpy as np
    >>> at, codes = np.array([3, 8]), np.array([2, 1], np.uint16)  # +1, -1
    >>> both = merge_changes(at, codes, np.array([5, 8]), np.array([4, 2], np.uint16), absolute=False)
    >>> [part.tolist() for part in both]
    [[3, 5], [2, 4]]
    """
    room = first.size + second.size
    positions, codes = np.empty(room, np.int64), np.empty(room, second_codes.dtype)
    spare = 64 - 8 * second_codes.itemsize
    found = int(_merge(first, first_codes, second, second_codes, absolute, spare, positions, codes))
    return positions[:found].copy(), codes[:found].copy()

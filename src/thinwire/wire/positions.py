"""Positions as gaps: the number of unchanged cells before each changed one.

>>> import numpy as np
>>> gaps = gaps_of(np.array([0, 1, 5], np.uint32), 0)
>>> gaps.tolist(), positions_of(gaps, 0, 6).tolist()
([0, 0, 3], [0, 1, 5])
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from thinwire.errors import MalformedError

__all__ = ["gaps_of", "positions_of"]

Positions = npt.NDArray[np.uint32]


@njit(nogil=True, cache=True)
def _gaps(positions, start, gaps):
    following = start
    for i in range(positions.shape[0]):
        position = np.int64(positions[i])
        gaps[i] = position - following
        following = position + 1


@njit(nogil=True, cache=True)
def _positions(gaps, start, stop, positions):
    following = start
    for i in range(gaps.shape[0]):
        position = following + np.int64(gaps[i])
        if position >= stop:
            return i
        positions[i] = position
        following = position + 1
    return -1


def gaps_of(positions: Positions, start: int) -> npt.NDArray[np.uint32]:
    """Gaps between strictly increasing ``positions`` (uint32, 1-d) that are at least ``start``."""
    gaps = np.empty_like(positions)
    _gaps(positions, start, gaps)
    return gaps


def positions_of(gaps: npt.NDArray[np.uint32], start: int, stop: int) -> Positions:
    """The inverse of :func:`gaps_of`. The result increases strictly and lies in ``start`` to ``stop - 1``.

    Raises:
        MalformedError: a position is at ``stop`` or beyond.
    """
    positions = np.empty_like(gaps)
    bad = _positions(gaps, start, stop, positions)
    if bad >= 0:
        raise MalformedError(f"changed position {bad} lies outside its segment of {stop - start} cells", index=bad)
    return positions

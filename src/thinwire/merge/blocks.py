"""Sums of sparse vectors, block by block: what :func:`thinwire.merge.combine.reduce_in_turn` computes, sooner.

Walking through all vectors position by position costs a comparison of every vector's next position for each entry.
Here a block of 2^14 positions is summed in dense buffers that stay in the cache, vector after vector, so that each
entry costs one addition; a bit for each position says which are held. The sums run in the same order, so that the
results are the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["gather_at", "reduce_blocks"]

_BLOCK = 1 << 14
_NO_POSITION = (1 << 63) - 1
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_INDEX = np.zeros(64, np.int64)  # of the only bit of a word, by the six highest bits of its product with the above
for _bit in range(64):
    _INDEX[((1 << _bit) * 0x03F79D71B4CB0A89 % (1 << 64)) >> 58] = _bit


@njit(nogil=True, cache=True)
def _count_votes(
    positions, values, first, last, start, weight, vote, divide, marks, totals, divisors, ballots, origins, zero, one
):
    """Mark the entries ``first`` to ``last`` of one vector in the block at ``start``, and count their votes; where
    nothing is voted on, they are added at once."""
    for at in range(first, last):
        place = np.int64(positions[at]) - start
        word, bit = place >> 6, np.uint64(1) << np.uint64(place & 63)
        if marks[word] & bit == 0:
            marks[word] |= bit
            totals[place] = divisors[place] = ballots[place] = zero
            origins[place] = at
        value = values[at]
        if vote == 0:
            totals[place] += weight * value
            if divide != 0:
                divisors[place] += one if divide == 2 else weight
        elif vote == 1:
            ballots[place] += weight * value
        elif vote == 2:
            ballots[place] += value
        elif vote == 3:
            ballots[place] += np.sign(value)


@njit(nogil=True, cache=True)
def _add(positions, values, first, last, start, weight, vote, divide, totals, divisors, ballots, one):
    """Add those entries whose sign is the elected one."""
    for at in range(first, last):
        place = np.int64(positions[at]) - start
        value = values[at]
        side = np.sign(weight * value) if vote == 1 else np.sign(value)
        if side == (1 if ballots[place] >= 0 else -1):
            totals[place] += weight * value
            divisors[place] += one if divide == 2 else weight


@njit(nogil=True, cache=True)
def _divided(total, divisor, divide, one, tiny):
    if divide == 1 and divisor != 0:
        total /= divisor
    elif divide == 2:
        total /= max(divisor, one)
    elif divide == 3:
        total /= max(divisor, tiny)
    return total


@njit(nogil=True, cache=True)
def reduce_blocks(
    positions, values, starts, weights, numbers, tiny, vote, divide, out_positions, out_values, out_entries
):
    """Fill the outputs as the walk does, and return how many positions there are."""
    count = starts.shape[0] - 1
    cursors, ends = starts[:-1].copy(), starts[:-1].copy()
    zero, one = numbers[0], numbers[1]  # not literals, or the sums would be in float64
    totals = np.empty(_BLOCK, values.dtype)
    divisors, ballots = np.empty(_BLOCK, values.dtype), np.empty(_BLOCK, values.dtype)
    origins, marks = np.empty(_BLOCK, np.int64), np.zeros(_BLOCK >> 6, np.uint64)
    found = 0
    while True:
        lowest = np.int64(_NO_POSITION)
        for t in range(count):
            if cursors[t] < starts[t + 1]:
                lowest = min(lowest, np.int64(positions[cursors[t]]))
        if lowest == _NO_POSITION:
            return found
        start = lowest // _BLOCK * _BLOCK
        for t in range(count):
            rest = positions[cursors[t] : starts[t + 1]]
            ends[t] = cursors[t] + np.searchsorted(rest, start + _BLOCK)
            _count_votes(
                positions, values, cursors[t], ends[t], start, weights[t], vote, divide, marks, totals, divisors,
                ballots, origins, zero, one,
            )  # fmt: skip
        for t in range(count):
            if vote != 0:
                _add(
                    positions, values, cursors[t], ends[t], start, weights[t], vote, divide, totals, divisors, ballots,
                    one,
                )  # fmt: skip
            cursors[t] = ends[t]
        for word in range(marks.shape[0]):
            left = marks[word]
            marks[word] = 0
            while left != 0:
                lowest_bit = left & (~left + np.uint64(1))
                place = (word << 6) + _INDEX[np.int64((lowest_bit * _DE_BRUIJN) >> np.uint64(58))]
                left ^= lowest_bit
                out_positions[found] = start + place
                out_values[found] = _divided(totals[place], divisors[place], divide, one, tiny)
                out_entries[found] = origins[place]
                found += 1


@njit(nogil=True, cache=True)
def gather_at(positions, shift, cells, out_positions, out_cells):
    """``positions`` plus ``shift`` and the ``cells`` there, in one pass; all of them must be inside."""
    for i in range(positions.shape[0]):
        place = np.int64(positions[i]) + shift
        out_positions[i] = place
        out_cells[i] = cells[place]

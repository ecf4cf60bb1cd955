"""The CPU's loops over the few elements that are sent: index coding, merging of slices, settling of residuals.

Each is the fast path of a readable version in torch operations (:mod:`thinwire.compress.indices`,
:mod:`thinwire.compress.oracle`), which the tests require it to equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from thinwire.wire.vector import load_u64, ones, store_u64, trailing_zeros

__all__ = [
    "intersect",
    "merge",
    "pack_bitmap",
    "pack_high",
    "pack_low",
    "settle",
    "unpack",
    "unpack_bitmap",
]


@njit(nogil=True, cache=True)
def pack_low(positions, low_bits, out):
    """The ``low_bits`` lowest bits of each position, end to end. ``out`` needs 8 spare bytes behind them."""
    mask = np.uint64((1 << low_bits) - 1)
    word = np.uint64(0)
    fill = 0
    at = 0
    for i in range(positions.shape[0]):
        low = np.uint64(positions[i]) & mask
        word |= low << np.uint64(fill)
        fill += low_bits
        if fill >= 64:
            store_u64(out, at, word)
            at += 8
            fill -= 64
            word = low >> np.uint64(low_bits - fill) if fill else np.uint64(0)
    store_u64(out, at, word)


@njit(nogil=True, cache=True)
def pack_high(positions, low_bits, bitmap):
    """Sets bit ``(position >> low_bits) + i`` for the i-th position in the zeroed uint8 ``bitmap``."""
    for i in range(positions.shape[0]):
        bit = (np.int64(positions[i]) >> low_bits) + i
        bitmap[bit >> 3] |= np.uint8(1 << (bit & 7))


@njit(nogil=True, cache=True)
def unpack(low, high, low_bits, numel, positions):
    """Inverse of the two above; ``high`` has 16 spare bytes, ``low`` 8. False for bytes not of sorted positions."""
    count = positions.shape[0]
    mask = np.uint64((1 << low_bits) - 1)
    found = 0
    last = np.int64(-1)
    for start in range(0, high.shape[0] - 8, 8):
        word = load_u64(high, start)
        while word != np.uint64(0):
            bit = (start << 3) + trailing_zeros(word)
            word &= word - np.uint64(1)
            if found == count:
                return False
            at = found * low_bits
            bits = load_u64(low, at >> 3) >> np.uint64(at & 7)  # low_bits <= 31, so that 64 - 7 bits hold them
            position = ((bit - found) << low_bits) | np.int64(bits & mask)
            if position <= last or position >= numel:
                return False
            positions[found] = position
            last = position
            found += 1
    return found == count


@njit(nogil=True, cache=True)
def pack_bitmap(positions, bitmap):
    for i in range(positions.shape[0]):
        bit = np.int64(positions[i])
        bitmap[bit >> 3] |= np.uint8(1 << (bit & 7))


@njit(nogil=True, cache=True)
def unpack_bitmap(bitmap, numel, positions):
    """Inverse of :func:`pack_bitmap`; ``bitmap`` has 16 spare bytes. False where it is not of ``count`` positions."""
    count = positions.shape[0]
    found = 0
    for start in range(0, bitmap.shape[0] - 8, 8):
        word = load_u64(bitmap, start)
        while word != np.uint64(0):
            position = (start << 3) + trailing_zeros(word)
            word &= word - np.uint64(1)
            if found == count or position >= numel:
                return False
            positions[found] = position
            found += 1
    return found == count


@njit(nogil=True, cache=True)
def mark(bitmap, positions):
    for i in range(positions.shape[0]):
        p = np.uint64(positions[i])
        bitmap[p >> np.uint64(6)] |= np.uint64(1) << (p & np.uint64(63))


@njit(nogil=True, cache=True)
def ranks_of(bitmap, before):
    """``before[w]``: bits set in the words below w. Returns all of them."""
    total = 0
    for w in range(bitmap.shape[0]):
        before[w] = total
        total += ones(bitmap[w])
    return total


@njit(nogil=True, cache=True)
def add_at_ranks(bitmap, before, positions, values, sums):
    for i in range(positions.shape[0]):
        p = np.uint64(positions[i])
        w = p >> np.uint64(6)
        below = bitmap[w] & ((np.uint64(1) << (p & np.uint64(63))) - np.uint64(1))
        sums[before[w] + ones(below)] += values[i]


@njit(nogil=True, cache=True)
def positions_of(bitmap, positions):
    found = 0
    for w in range(bitmap.shape[0]):
        word = bitmap[w]
        while word != np.uint64(0):
            positions[found] = (w << 6) + trailing_zeros(word)
            word &= word - np.uint64(1)
            found += 1


def merge(slices: Sequence[tuple[Any, Any]], length: int) -> tuple[Any, Any]:
    """Sums sorted sparse slices of a region of ``length`` elements, in their order: ``(positions, sums)``.

    The sums live at the ranks of their positions in a bitmap of the union, so that memory follows the number of
    entries and stays in cache, and no dense region is zeroed.
    """
    bitmap = np.zeros((length + 63) // 64, np.uint64)
    for positions, _ in slices:
        mark(bitmap, positions)
    before = np.empty(bitmap.shape[0], np.int32)
    total = ranks_of(bitmap, before)
    sums = np.zeros(total, np.float32)
    for positions, values in slices:
        add_at_ranks(bitmap, before, positions, values, sums)
    merged = np.empty(total, np.int32)
    positions_of(bitmap, merged)
    return merged, sums


@njit(nogil=True, cache=True)
def intersect(positions, others, member):
    """``member[i]``: whether ``positions[i]`` is among ``others``; both sorted.

    Both sides advance by the outcome of a comparison, without a branch: which comes next cannot be foretold.
    """
    i, j, length, count = 0, 0, positions.shape[0], others.shape[0]
    while i < length and j < count:
        p, other = positions[i], others[j]
        member[i] = p == other  # written anew until i moves on
        i += p <= other
        j += other <= p
    while i < length:
        member[i] = False
        i += 1


@njit(nogil=True, cache=True)
def settle(residual, positions, values):
    for i in range(positions.shape[0]):
        residual[positions[i]] -= values[i]

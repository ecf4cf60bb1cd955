"""Logarithmic bins and the tables of their frequencies: the model that :mod:`thinwire.wire.rans` codes with.

An integer's bin keeps its highest bit and ``mantissa`` bits below it; small integers have a bin each. Within a bin the
integers are taken to be equally likely. The encoder picks the mantissa and the precision of the frequencies for each
chunk, since a table is a considerable part of a small one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from thinwire.wire.vector import leading_zeros

__all__ = [
    "BINS_MAX",
    "CHUNK",
    "MANTISSA_MAX",
    "PRECISION_MAX",
    "bin_floor",
    "bin_of",
    "choose_table",
    "fill",
    "get_table",
    "put_table",
]

CHUNK = 1 << 16  # integers coded with one table
MANTISSA_MAX = 6
PRECISION_MIN, PRECISION_MAX = 5, 12
BINS_MAX = 1024

_FAST_MANTISSA = 3


@njit(nogil=True, cache=True)
def bin_of(value, mantissa):
    top = 63 - leading_zeros(value | np.uint64(1))
    extra = max(top - mantissa, 0)
    return (extra << mantissa) + np.int64(value >> np.uint64(extra)), extra


@njit(nogil=True, cache=True)
def bin_floor(index, mantissa):
    """The least integer of a bin, and its number of raw bits."""
    extra = max((index >> mantissa) - 1, 0)
    return np.uint64(index - (extra << mantissa)) << np.uint64(extra), extra


@njit(nogil=True, cache=True)
def fill(array):
    """Zeros. A loop, since Numba compiles the checks of a slice assignment for seconds."""
    for i in range(array.shape[0]):
        array[i] = 0


@njit(nogil=True, cache=True)
def _golomb_bits(value, k):
    return 2 * (63 - leading_zeros(np.uint64((value >> k) + 1))) + 1 + k


@njit(nogil=True, cache=True)
def _table_bits(frequencies, bins, k):
    bits = 32
    for s in range(bins):
        bits += _golomb_bits(frequencies[s], k)
    return bits


@njit(nogil=True, cache=True)
def _normalise(counts, bins, total, precision, frequencies):
    """Scale ``counts`` to integers >= 1 (0 stays 0) that sum to ``2**precision``; False if they cannot."""
    scale = 1 << precision
    used = 0
    left = scale
    for s in range(bins):
        c = counts[s]
        frequencies[s] = 0
        if c > 0:
            used += 1
            f = (c * scale + (total >> 1)) // total
            frequencies[s] = max(f, 1)
            left -= frequencies[s]
    if used > scale:
        return False
    while left != 0:
        best = 0
        for s in range(1, bins):
            if frequencies[s] > frequencies[best]:
                best = s
        if left > 0:
            frequencies[best] += left
            left = 0
        else:  # take from the largest, at most a quarter of it at once, so that no single bin pays for all
            take = min(-left, max(frequencies[best] >> 2, 1))
            frequencies[best] -= take
            left += take
    return True


@njit(nogil=True, cache=True)
def _fold(fine, fine_mantissa, coarse, mantissa):
    """Histogram at a coarser mantissa; returns (bins, raw bits)."""
    fill(coarse)
    bins = 0
    raw = 0
    for s in range(fine.shape[0]):
        c = fine[s]
        if c > 0:
            low, _ = bin_floor(s, fine_mantissa)
            b, extra = bin_of(low, mantissa)
            if b >= BINS_MAX:
                return -1, 0
            coarse[b] += c
            raw += c * extra
            bins = max(bins, b + 1)
    return bins, raw


@njit(nogil=True, cache=True)
def _entropy_bits(counts, bins, total):
    bits = 0.0
    used = 0
    for s in range(bins):
        c = counts[s]
        if c > 0:
            bits -= c * np.log2(c / total)
            used += 1
    return bits, used


@njit(nogil=True, cache=True)
def _coded_bits(counts, frequencies, bins, precision):
    bits = 0.0
    for s in range(bins):
        if counts[s] > 0:
            bits += counts[s] * (precision - np.log2(frequencies[s]))
    return bits


@njit(nogil=True, cache=True)
def choose_table(fine, total, effort, counts, frequencies):
    """Pick mantissa, precision and Golomb parameter; fills ``counts`` and ``frequencies``.

    Returns (mantissa, precision, k, bins).
    """
    best_mantissa = _FAST_MANTISSA
    if effort > 0 or total < 4096:
        best = np.inf
        for mantissa in range(MANTISSA_MAX + 1):
            bins, raw = _fold(fine, MANTISSA_MAX, counts, mantissa)
            if bins < 0:
                break
            bits, used = _entropy_bits(counts, bins, total)
            cost = bits + raw + min(9.0, 3.0 + np.log2(total)) * used + bins
            if cost < best:
                best = cost
                best_mantissa = mantissa
    bins, _ = _fold(fine, MANTISSA_MAX, counts, best_mantissa)
    best_precision = PRECISION_MAX
    if total < 4 * CHUNK and (effort > 0 or total < 4096):
        best = np.inf
        for precision in range(PRECISION_MIN, PRECISION_MAX + 1):
            if _normalise(counts, bins, total, precision, frequencies):
                table = min(_table_bits(frequencies, bins, 0), _table_bits(frequencies, bins, 2))
                cost = _coded_bits(counts, frequencies, bins, precision) + table
                if cost < best:
                    best = cost
                    best_precision = precision
    _normalise(counts, bins, total, best_precision, frequencies)
    best_k = 0
    best_table = _table_bits(frequencies, bins, 0)
    for k in range(1, 8):
        table = _table_bits(frequencies, bins, k)
        if table < best_table:
            best_table = table
            best_k = k
    return best_mantissa, best_precision, best_k, bins


@njit(nogil=True, cache=True)
def _put_bits(out, bit, value, count):
    """OR ``count`` low bits of ``value`` into zeroed bytes ``out`` at bit ``bit``."""
    while count > 0:
        room = 8 - (bit & 7)
        take = min(room, count)
        out[bit >> 3] |= np.uint8((value & ((1 << take) - 1)) << (bit & 7))
        value >>= take
        bit += take
        count -= take
    return bit


@njit(nogil=True, cache=True)
def put_table(out, at, mantissa, precision, k, frequencies, bins):
    bit = _put_bits(out, at * 8, mantissa, 3)
    bit = _put_bits(out, bit, precision, 4)
    bit = _put_bits(out, bit, k, 3)
    bit = _put_bits(out, bit, bins - 1, 10)
    for s in range(bins):
        v = (frequencies[s] >> k) + 1
        n = 63 - leading_zeros(np.uint64(v))
        bit = _put_bits(out, bit, 1 << n, n + 1)  # n zeros, then a one
        bit = _put_bits(out, bit, v - (1 << n), n)
        bit = _put_bits(out, bit, frequencies[s] & ((1 << k) - 1), k)
    return (bit + 7) >> 3


@njit(nogil=True, cache=True)
def _get_bits(data, bit, count):
    value = 0
    got = 0
    while got < count:
        take = min(8 - (bit & 7), count - got)
        part = (np.int64(data[bit >> 3]) >> (bit & 7)) & ((1 << take) - 1)
        value |= part << got
        got += take
        bit += take
    return value


@njit(nogil=True, cache=True)
def get_table(data, at, end, width, frequencies):
    """Read a table; returns (mantissa, precision, bins, next byte), bins < 0 if it is malformed."""
    last = end * 8
    bit = at * 8
    if bit + 20 > last:
        return 0, 0, -1, at
    mantissa = _get_bits(data, bit, 3)
    precision = _get_bits(data, bit + 3, 4)
    k = _get_bits(data, bit + 7, 3)
    bins = _get_bits(data, bit + 10, 10) + 1
    bit += 20
    if mantissa > MANTISSA_MAX or precision < PRECISION_MIN or precision > PRECISION_MAX:
        return 0, 0, -1, at
    if max(((bins - 1) >> mantissa) - 1, 0) + mantissa >= width:  # the last bin holds wider integers than asked for
        return 0, 0, -1, at
    total = 0
    for s in range(bins):
        n = 0
        while bit < last and _get_bits(data, bit, 1) == 0:
            n += 1
            bit += 1
        if n > PRECISION_MAX or bit + 1 + n + k > last:
            return 0, 0, -1, at
        v = (1 << n) + _get_bits(data, bit + 1, n)
        frequencies[s] = ((v - 1) << k) + _get_bits(data, bit + 1 + n, k)
        bit += 1 + n + k
        total += frequencies[s]
    if total != 1 << precision:
        return 0, 0, -1, at
    return mantissa, precision, bins, (bit + 7) >> 3

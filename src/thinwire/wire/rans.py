"""Entropy coding of unsigned integers: logarithmic bins through interleaved rANS, the bits below a bin as they are.

A chunk of up to 65,536 integers is coded by itself. Each integer falls into a bin that keeps its ``mantissa`` leading
bits below the highest one; the bin goes through a range coder with static frequencies of ``precision`` bits, the
remaining bits are stored raw. With 3 or 4 mantissa bits the loss against the entropy is about 0.01 bit for the
geometric and two-sided geometric data that position gaps and rounding steps are, and both directions run at hundreds
of millions of integers a second on one core. ``docs/spec/v1.md`` has the format bit by bit;
:mod:`thinwire.wire.reference` decodes it in plain Python and is the oracle of the tests.

Source: Duda, "Asymmetric numeral systems" (arXiv:1311.2540); interleaving as in Giesen (arXiv:1402.3392).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from thinwire.errors import MalformedError
from thinwire.wire.bins import (
    BINS_MAX,
    CHUNK,
    MANTISSA_MAX,
    PRECISION_MAX,
    bin_floor,
    bin_of,
    choose_table,
    fill,
    get_table,
    put_table,
)
from thinwire.wire.vector import load_u16, load_u64, store_u16, store_u64

__all__ = ["CHUNK", "EFFORT_FAST", "EFFORT_SMALL", "decode", "encode", "encoded_size_max"]

LANES_FROM = 2048  # from this many integers on, a chunk has 8 lanes instead of 1
LOW = 1 << 15  # states stay in [2^15, 2^31)

EFFORT_FAST = 0
EFFORT_SMALL = 1

_TABLE_BYTES_MAX = 4096


@njit(nogil=True, cache=True)
def _put(x, packed, s, words, w):
    """Push symbol ``s`` on state ``x``; a word that leaves it is written below byte ``w``."""
    store_u16(words, w - 2, np.uint64(x))
    full = np.int64(x >= packed[s, 1])
    x >>= full << 4
    q = np.int64((np.uint64(x) * np.uint64(packed[s, 2])) >> np.uint64(packed[s, 3]))
    return x + packed[s, 0] + q * packed[s, 4], w - (full << 1)


@njit(nogil=True, cache=True)
def _take(x, precision, slots, data, at):
    """Pop a symbol from state ``x``, which takes a word in from byte ``at`` if it has become small."""
    entry = np.int64(slots[x & ((1 << precision) - 1)])
    x = ((entry >> 22) + 1) * (x >> precision) + ((entry >> 10) & 4095)
    low = np.int64(x < LOW)
    x = (x << (low << 4)) | (np.int64(load_u16(data, at)) & -low)
    return x, at + (low << 1), np.uint16(entry & 1023)


@njit(nogil=True, cache=True)
def _encode_chunk(values, effort, out, at, symbols, words, fine, counts, frequencies, packed):
    """Append one chunk of ``values`` to ``out`` at byte ``at``; returns the next byte."""
    n = values.shape[0]
    fill(fine)
    for i in range(n):
        b, _ = bin_of(np.uint64(values[i]), MANTISSA_MAX)
        fine[b] += 1
    mantissa, precision, k, bins = choose_table(fine, n, effort, counts, frequencies)
    at = put_table(out, at, mantissa, precision, k, frequencies, bins)

    start = 0
    for s in range(bins):  # start, frequency and reciprocal of each bin (Alverson; states have 31 bits)
        f = frequencies[s]
        if f > 0:
            shift = 0
            while f > (1 << shift):
                shift += 1
            packed[s, 0] = start
            packed[s, 1] = f << (31 - precision)
            if f == 1:
                packed[s, 2] = 0xFFFFFFFF
                packed[s, 3] = 32
                packed[s, 0] = start + (1 << precision) - 1
            else:
                packed[s, 2] = ((1 << (shift + 31)) + f - 1) // f
                packed[s, 3] = 31 + shift
            packed[s, 4] = (1 << precision) - f
            start += f

    # raw bits go behind the room for the words first, and move up when the number of words is known
    raw_start = at + 3 + 2 * n + 32
    raw_at = raw_start
    accumulator = np.uint64(0)
    held = 0
    for i in range(n):
        v = np.uint64(values[i])
        b, extra = bin_of(v, mantissa)
        symbols[i] = b
        if extra > 32:  # in two halves: the accumulator has 64 bits, of which up to 31 are held
            accumulator |= (v & np.uint64(0xFFFFFFFF)) << np.uint64(held)
            store_u64(out, raw_at, accumulator)
            accumulator >>= np.uint64(32)
            raw_at += 4
            v >>= np.uint64(32)
            extra -= 32
        accumulator |= (v & ((np.uint64(1) << np.uint64(extra)) - np.uint64(1))) << np.uint64(held)
        held += extra
        store_u64(out, raw_at, accumulator)  # bytes behind the held bits are written over by the next one
        whole = held & ~7 if held < 64 else 56
        accumulator >>= np.uint64(whole)
        raw_at += whole >> 3
        held -= whole
    if held > 0:
        raw_at += 1

    lanes = 8 if n >= LANES_FROM else 1
    states = np.empty(8, np.int64)
    for lane in range(8):
        states[lane] = LOW
    w = 2 * n  # words are written backwards
    tail = n if lanes == 1 else n & 7
    for j in range(tail):
        i = n - 1 - j
        states[i & (lanes - 1)], w = _put(states[i & (lanes - 1)], packed, np.int64(symbols[i]), words, w)
    if lanes == 8:
        x0, x1, x2, x3 = states[0], states[1], states[2], states[3]
        x4, x5, x6, x7 = states[4], states[5], states[6], states[7]
        for i in range(n - tail - 8, -1, -8):
            x7, w = _put(x7, packed, np.int64(symbols[i + 7]), words, w)
            x6, w = _put(x6, packed, np.int64(symbols[i + 6]), words, w)
            x5, w = _put(x5, packed, np.int64(symbols[i + 5]), words, w)
            x4, w = _put(x4, packed, np.int64(symbols[i + 4]), words, w)
            x3, w = _put(x3, packed, np.int64(symbols[i + 3]), words, w)
            x2, w = _put(x2, packed, np.int64(symbols[i + 2]), words, w)
            x1, w = _put(x1, packed, np.int64(symbols[i + 1]), words, w)
            x0, w = _put(x0, packed, np.int64(symbols[i]), words, w)
        states[0], states[1], states[2], states[3] = x0, x1, x2, x3
        states[4], states[5], states[6], states[7] = x4, x5, x6, x7
    count = n - (w >> 1)
    for j in range(3):
        out[at + j] = np.uint8((count >> (8 * j)) & 255)
    at += 3
    for lane in range(lanes):
        for j in range(4):
            out[at + j] = np.uint8((states[lane] >> (8 * j)) & 255)
        at += 4
    for j in range(2 * count):
        out[at + j] = words[w + j]
    at += 2 * count
    length = raw_at - raw_start
    for j in range(length):  # forward, since the two may overlap
        out[at + j] = out[raw_start + j]
    for j in range(at + length, raw_at + 8):
        out[j] = 0
    return at + length


@njit(nogil=True, cache=True)
def _encode_stream(values, effort, out):
    symbols = np.empty(CHUNK, np.uint16)
    words = np.empty(2 * CHUNK + 2, np.uint8)
    fine = np.empty(64 << MANTISSA_MAX, np.int64)
    counts = np.empty(BINS_MAX, np.int64)
    frequencies = np.empty(BINS_MAX, np.int64)
    packed = np.empty((BINS_MAX, 5), np.int64)
    at = 0
    for start in range(0, values.shape[0], CHUNK):
        chunk = values[start : start + CHUNK]
        at = _encode_chunk(chunk, effort, out, at, symbols, words[2:], fine, counts, frequencies, packed)
    return at


@njit(nogil=True, cache=True)
def _decode_chunk(data, at, end, width, values, symbols, frequencies, slots):
    """Decode one chunk from byte ``at``; returns the next byte, or -1 if it is malformed."""
    n = values.shape[0]
    mantissa, precision, bins, at = get_table(data, at, end, width, frequencies)
    lanes = 8 if n >= LANES_FROM else 1
    if bins < 0 or at + 3 + 4 * lanes > end:
        return -1
    slot = 0
    for s in range(bins):  # a slot holds frequency - 1 (12 bits), offset in the bin (12) and the bin (10)
        f = frequencies[s]
        for j in range(f):
            slots[slot + j] = ((f - 1) << 22) | (j << 10) | s
        slot += f
    words = np.int64(data[at]) | (np.int64(data[at + 1]) << 8) | (np.int64(data[at + 2]) << 16)
    at += 3
    states = np.empty(8, np.int64)
    for lane in range(lanes):
        x = np.int64(0)
        for j in range(4):
            x |= np.int64(data[at + j]) << (8 * j)
        if x < LOW or x >= (LOW << 16):
            return -1
        states[lane] = x
        at += 4
    word_end = at + 2 * words
    if words > n or word_end > end:
        return -1
    safe = 0
    if lanes == 8 and at + 2 * n + 2 <= data.shape[0]:  # words may then be read ahead without looking
        safe = n & ~7
        x0, x1, x2, x3 = states[0], states[1], states[2], states[3]
        x4, x5, x6, x7 = states[4], states[5], states[6], states[7]
        for i in range(0, safe, 8):
            x0, at, symbols[i] = _take(x0, precision, slots, data, at)
            x1, at, symbols[i + 1] = _take(x1, precision, slots, data, at)
            x2, at, symbols[i + 2] = _take(x2, precision, slots, data, at)
            x3, at, symbols[i + 3] = _take(x3, precision, slots, data, at)
            x4, at, symbols[i + 4] = _take(x4, precision, slots, data, at)
            x5, at, symbols[i + 5] = _take(x5, precision, slots, data, at)
            x6, at, symbols[i + 6] = _take(x6, precision, slots, data, at)
            x7, at, symbols[i + 7] = _take(x7, precision, slots, data, at)
        states[0], states[1], states[2], states[3] = x0, x1, x2, x3
        states[4], states[5], states[6], states[7] = x4, x5, x6, x7
    for i in range(safe, n):
        x = states[i & (lanes - 1)]
        entry = np.int64(slots[x & ((1 << precision) - 1)])
        symbols[i] = entry & 1023
        x = ((entry >> 22) + 1) * (x >> precision) + ((entry >> 10) & 4095)
        if x < LOW:
            if at + 2 > word_end:
                return -1
            x = (x << 16) | np.int64(load_u16(data, at))
            at += 2
        states[i & (lanes - 1)] = x
    if at != word_end:
        return -1
    for lane in range(lanes):
        if states[lane] != LOW:
            return -1
    return _decode_raw(data, at, end, values, symbols, mantissa)


@njit(nogil=True, cache=True)
def _peek(data, bit):
    """At least 32 bits from bit ``bit`` on; zeros behind the end of ``data``."""
    at = bit >> 3
    if at + 8 <= data.shape[0]:
        return load_u64(data, at) >> np.uint64(bit & 7)
    word = np.uint64(0)
    for j in range(data.shape[0] - at):
        word |= np.uint64(data[at + j]) << np.uint64(8 * j)
    return word >> np.uint64(bit & 7)


@njit(nogil=True, cache=True)
def _decode_raw(data, at, end, values, symbols, mantissa):
    n = values.shape[0]
    bits = 0
    for i in range(n):
        bits += max((np.int64(symbols[i]) >> mantissa) - 1, 0)
    last = at + ((bits + 7) >> 3)
    if last > end:
        return -1
    bit = at * 8
    for i in range(n):
        low, extra = bin_floor(np.int64(symbols[i]), mantissa)
        if extra > 32:
            low |= _peek(data, bit) & np.uint64(0xFFFFFFFF)
            part = _peek(data, bit + 32) & ((np.uint64(1) << np.uint64(extra - 32)) - np.uint64(1))
            values[i] = low | (part << np.uint64(32))
        else:
            values[i] = low | (_peek(data, bit) & ((np.uint64(1) << np.uint64(extra)) - np.uint64(1)))
        bit += extra
    if bit & 7 and data[last - 1] >> (bit & 7) != 0:
        return -1
    return last


@njit(nogil=True, cache=True)
def _decode_stream(data, width, values):
    symbols = np.empty(CHUNK, np.uint16)
    frequencies = np.empty(BINS_MAX, np.int64)
    slots = np.zeros(1 << PRECISION_MAX, np.uint64)
    at = 0
    for start in range(0, values.shape[0], CHUNK):
        chunk = values[start : start + CHUNK]
        at = _decode_chunk(data, at, data.shape[0], width, chunk, symbols, frequencies, slots)
        if at < 0:
            return -1
    return at


def encoded_size_max(count: int, width: int) -> int:
    """Upper bound in bytes of ``count`` integers of ``width`` bytes, encoded. Bounds every read of a stream."""
    chunks = -(-count // CHUNK)
    return chunks * (_TABLE_BYTES_MAX + 64) + count * (2 + width)


def encode(values: npt.NDArray[np.unsignedinteger], effort: int = EFFORT_SMALL) -> bytes:
    """Encode a 1-d array of unsigned integers (uint8, uint16, uint32 or uint64).

    >>> gaps = np.array([3, 0, 7, 100_000], np.uint32)
    >>> decode(encode(gaps), 4, np.uint32).tolist()
    [3, 0, 7, 100000]
    """
    wide = values if values.itemsize >= 4 else values.astype(np.uint32)  # two kinds of input to compile for, not four
    room = min(wide.size, CHUNK) * (4 + wide.itemsize) + 64
    out = np.zeros(encoded_size_max(wide.size, wide.itemsize) + room, np.uint8)
    used = _encode_stream(wide, effort, out)
    return out[:used].tobytes()


def decode(
    data: bytes | memoryview | npt.NDArray[np.uint8], count: int, dtype: npt.DTypeLike
) -> npt.NDArray[np.unsignedinteger]:
    """Decode ``count`` integers; the inverse of :func:`encode`. ``count`` is allocated: bound it before.

    Raises:
        MalformedError: the bytes are not exactly one encoding of ``count`` integers that fit ``dtype``.
    """
    kind = np.dtype(dtype)
    values = np.empty(count, kind if kind.itemsize >= 4 else np.uint32)
    source = np.frombuffer(data, np.uint8)
    used = _decode_stream(source, 8 * kind.itemsize, values)
    if used != source.size:
        raise MalformedError(
            f"entropy-coded stream is damaged: {source.size} bytes for {count} integers", bytes=source.size, count=count
        )
    return values if values.dtype == kind else values.astype(kind)

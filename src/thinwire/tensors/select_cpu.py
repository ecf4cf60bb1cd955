# ruff: noqa: ARG001  Numba prescribes the parameters of an intrinsic
"""The loops of selection by magnitude on the CPU, compiled by Numba; :mod:`thinwire.tensors.select_stripes` runs them.

A "key" is the bits of ``|x|`` as an unsigned integer: keys order as magnitudes do, and NaN lies above infinity. The
masks of 64 lanes are vector instructions on any processor; what is hot in a mask is found by counting zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from thinwire.wire.vector import LANES, hot_lanes, trailing_zeros

__all__ = ["BINS", "accumulate", "collect", "emit", "emit_from", "fill", "sample", "sample_sum", "tally"]

BINS = 4096
_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_SPREAD = 2654435761  # Knuth's multiplicative hash: samples at a plain stride would meet the period of a layer


# --- one pass that collects ------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _reaching(bits, start, count, limit):
    if count == LANES:
        return ~hot_lanes(bits, start, _MAGNITUDE, limit)
    mask = np.uint64(0)
    for j in range(count):
        if bits[start + j] & _MAGNITUDE >= limit:
            mask |= np.uint64(1) << np.uint64(j)
    return mask


@njit(nogil=True, cache=True)
def collect(bits, offset, limit, indices, keys):
    """Write ``offset`` + position and key of all keys >= ``limit``; returns their count, or -1 if there is no room."""
    n, room, found = bits.shape[0], indices.shape[0], 0
    for start in range(0, n, LANES):
        lanes = _reaching(bits, start, min(LANES, n - start), limit)
        if lanes != np.uint64(0) and found + LANES > room:
            return -1
        while lanes != np.uint64(0):
            i = start + trailing_zeros(lanes)
            lanes &= lanes - np.uint64(1)
            indices[found] = offset + i
            keys[found] = bits[i] & _MAGNITUDE
            found += 1
    return found


@intrinsic
def _accumulate_lanes(
    typingctx: Any, gradient: Any, residual: Any, out: Any, start: Any, scale: Any, keep: Any, limit: Any
) -> Any:
    """``out = scale * gradient + keep * residual`` in 64 lanes; bit j is set where its key is >= ``limit``."""
    signature = types.uint64(gradient, residual, out, types.int64, types.float32, types.float32, types.uint32)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        floats, words = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)

        def pointer(k: int) -> Any:
            data = context.make_array(sig.args[k])(context, builder, args[k]).data
            return builder.bitcast(builder.gep(data, [args[3]]), floats.as_pointer())

        def spread(value: Any, kind: Any) -> Any:
            empty, lane = ir.Constant(kind, ir.Undefined), ir.IntType(32)
            first = builder.insert_element(empty, value, ir.Constant(lane, 0))
            return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(lane, LANES), [0] * LANES))

        # Plain multiply, multiply, add: no flag allows LLVM to fuse them, so the rounding is torch's.
        left = builder.fmul(spread(args[4], floats), builder.load(pointer(0), align=4))
        right = builder.fmul(spread(args[5], floats), builder.load(pointer(1), align=4))
        total = builder.fadd(left, right)
        builder.store(total, pointer(2), align=4)
        magnitude = ir.Constant(words, [int(_MAGNITUDE)] * LANES)
        keys = builder.and_(builder.bitcast(total, words), magnitude)
        return builder.bitcast(builder.icmp_unsigned(">=", keys, spread(args[6], words)), ir.IntType(64))

    return signature, codegen


@njit(nogil=True, cache=True)
def _accumulate(gradient, residual, out, bits, start, count, scale, keep, limit):
    if count == LANES:
        return _accumulate_lanes(gradient, residual, out, start, scale, keep, limit)
    for i in range(start, start + count):
        out[i] = scale * gradient[i] + keep * residual[i]
    return _reaching(bits, start, count, limit)


@njit(nogil=True, cache=True)
def accumulate(gradient, residual, out, bits, offset, scale, keep, limit, indices, keys):
    """:func:`collect` of ``scale * gradient + keep * residual``, written to ``out``, of which ``bits`` is a view.

    Without room the sum is finished all the same.
    """
    n, room, found = out.shape[0], indices.shape[0], 0
    full = False
    for start in range(0, n, LANES):
        lanes = _accumulate(gradient, residual, out, bits, start, min(LANES, n - start), scale, keep, limit)
        if lanes != np.uint64(0) and found + LANES > room:
            full = True
        if full:
            continue
        while lanes != np.uint64(0):
            i = start + trailing_zeros(lanes)
            lanes &= lanes - np.uint64(1)
            indices[found] = offset + i
            keys[found] = bits[i] & _MAGNITUDE
            found += 1
    return -1 if full else found


# --- bounds: a sample, or histograms ---------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def sample(bits, keys):
    """One key from each of ``keys.size`` equal runs of ``bits``, at places that only depend on the sizes."""
    n, size = bits.shape[0], keys.shape[0]
    for j in range(size):
        keys[j] = bits[j * n // size + ((j * _SPREAD) >> 7) % (n // size)] & _MAGNITUDE


@njit(nogil=True, cache=True)
def sample_sum(gradient, residual, scale, keep, sums):
    """:func:`sample` of ``scale * gradient + keep * residual``, as floats."""
    n, size = gradient.shape[0], sums.shape[0]
    for j in range(size):
        i = j * n // size + ((j * _SPREAD) >> 7) % (n // size)
        sums[j] = scale * gradient[i] + keep * residual[i]


@njit(nogil=True, cache=True)
def tally(bits, low, span, shift, counts):
    """Count the keys from ``low`` to ``low + span`` in bins of ``2 ** shift``; ``counts`` is uint32 [4, BINS], zeroed.

    Four histograms take turns, since equal neighbours would wait for each other's store.
    """
    n = bits.shape[0]
    for start in range(0, n - 3, 4):
        for turn in range(4):
            above = (bits[start + turn] & _MAGNITUDE) - low  # wraps round below low
            if above <= span:
                counts[turn, above >> shift] += np.uint32(1)
    for i in range(n - n % 4, n):
        above = (bits[i] & _MAGNITUDE) - low
        if above <= span:
            counts[0, above >> shift] += np.uint32(1)


# --- the answer ------------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def emit(bits, offset, key, ties, out):
    """Write ``offset`` + position of all keys > ``key`` and of the first ``ties`` equal ones, to fill ``out``."""
    n, found, last = bits.shape[0], 0, out.shape[0]
    for start in range(0, n, LANES):
        if found == last:
            break
        lanes = _reaching(bits, start, min(LANES, n - start), key)
        while lanes != np.uint64(0):
            i = start + trailing_zeros(lanes)
            lanes &= lanes - np.uint64(1)
            if bits[i] & _MAGNITUDE == key:
                if ties == 0:
                    continue
                ties -= 1
            out[found] = offset + i
            found += 1
    return found


@njit(nogil=True, cache=True)
def emit_from(indices, keys, key, ties, out):
    """:func:`emit` among collected candidates."""
    found, last = 0, out.shape[0]
    for j in range(keys.shape[0]):
        if found == last:
            break
        tie = keys[j] == key
        out[found] = indices[j]
        taken = keys[j] > key or (tie and ties > 0)
        ties -= tie
        found += taken
    return found


@njit(nogil=True, cache=True)
def fill(out, offset, indices, values):
    """Zero ``out`` and write ``values`` at ``indices - offset``, block by block, while the block is in cache.

    Returns how many were written: less than all if the indices do not increase strictly within ``out``.
    """
    n, m, j, before = out.shape[0], indices.shape[0], 0, -1
    for start in range(0, n, BINS):
        stop = min(start + BINS, n)
        for i in range(start, stop):
            out[i] = np.float32(0)
        while j < m:
            i = np.int64(indices[j]) - offset
            if i <= before or i >= stop:
                break
            out[i] = values[j]
            before = i
            j += 1
    return j

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
_LINE = 16  # floats in a cache line
_AHEAD = 2048  # elements: the processor's own prefetching stops at the end of each page
_SPREAD = 2654435761  # Knuth's multiplicative hash: samples at a plain stride would meet the period of a layer


# --- vectors ----------------------------------------------------------------------------------------------------------


def _pointer(context: Any, builder: Any, sig: Any, args: Any, array: int, index: Any, kind: Any) -> Any:
    data = context.make_array(sig.args[array])(context, builder, args[array]).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _store(builder: Any, value: Any, pointer: Any, *, past_cache: bool) -> None:
    """``past_cache``: the processor need not read what it overwrites; the address must be a multiple of 64 bytes."""
    stored = builder.store(value, pointer, align=64 if past_cache else 4)
    if past_cache:
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


def _type_ask(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache lines of 64 lanes from ``index`` on, which need not exist, to be read soon."""
    signature = types.void(array, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte, word, long = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        name = "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word])
        call = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        for line in range(0, LANES, _LINE):
            pointer = _pointer(context, builder, sig, args, 0, builder.add(args[1], long(line)), byte)
            builder.call(call, [pointer, word(0), word(3), word(1)])  # for reading, into all levels, data
        return context.get_dummy_value()

    return signature, codegen


def _type_stream(typingctx: Any, source: Any, start: Any, out: Any, at: Any) -> Any:
    """Copy 64 floats past the cache; ``out[at]`` must lie at a multiple of 64 bytes."""
    signature = types.void(source, types.int64, out, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.VectorType(ir.FloatType(), LANES)
        value = builder.load(_pointer(context, builder, sig, args, 0, args[1], kind), align=4)
        _store(builder, value, _pointer(context, builder, sig, args, 2, args[3], kind), past_cache=True)
        return context.get_dummy_value()

    return signature, codegen


def _accumulating(past_cache: bool) -> Any:
    def typed(
        typingctx: Any, gradient: Any, residual: Any, out: Any, start: Any, scale: Any, keep: Any, limit: Any
    ) -> Any:
        signature = types.uint64(gradient, residual, out, types.int64, types.float32, types.float32, types.uint32)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            floats, words = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)

            def spread(value: Any, kind: Any) -> Any:
                empty, lane = ir.Constant(kind, ir.Undefined), ir.IntType(32)
                first = builder.insert_element(empty, value, ir.Constant(lane, 0))
                return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(lane, LANES), [0] * LANES))

            left, right, to = (_pointer(context, builder, sig, args, k, args[3], floats) for k in range(3))
            # Plain multiply, multiply, add: no flag allows LLVM to fuse them, so the rounding is torch's.
            first = builder.fmul(spread(args[4], floats), builder.load(left, align=4))
            second = builder.fmul(spread(args[5], floats), builder.load(right, align=4))
            total = builder.fadd(first, second)
            _store(builder, total, to, past_cache=past_cache)
            magnitude = ir.Constant(words, [int(_MAGNITUDE)] * LANES)
            keys = builder.and_(builder.bitcast(total, words), magnitude)
            return builder.bitcast(builder.icmp_unsigned(">=", keys, spread(args[6], words)), ir.IntType(64))

        return signature, codegen

    typed.__doc__ = """``out = scale * gradient + keep * residual``; bit j is set where its key is >= ``limit``."""
    return intrinsic(typed)


_ask: Any = intrinsic(_type_ask)
_stream: Any = intrinsic(_type_stream)
_accumulate_lanes, _accumulate_lanes_past_cache = _accumulating(False), _accumulating(True)


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
        _ask(bits, start + _AHEAD)
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


@njit(nogil=True, cache=True)
def accumulate(gradient, residual, out, bits, offset, scale, keep, limit, past_cache, indices, keys, sums):
    """:func:`collect` of ``scale * gradient + keep * residual``, written to ``out``; ``bits`` and ``sums`` are views.

    ``past_cache`` needs ``out`` to be apart from the others and at a multiple of 64 bytes. Without room the sum is
    finished all the same.
    """
    n, room, found = out.shape[0], indices.shape[0], 0
    full = False
    for start in range(0, n, LANES):
        _ask(gradient, start + _AHEAD)
        _ask(residual, start + _AHEAD)
        if n - start < LANES:
            for i in range(start, n):
                out[i] = scale * gradient[i] + keep * residual[i]
            lanes = _reaching(bits, start, n - start, limit)
        elif past_cache:
            lanes = _accumulate_lanes_past_cache(gradient, residual, out, start, scale, keep, limit)
        else:
            lanes = _accumulate_lanes(gradient, residual, out, start, scale, keep, limit)
        if lanes != np.uint64(0) and found + LANES > room:
            full = True
        if full:
            continue
        while lanes != np.uint64(0):
            i = start + trailing_zeros(lanes)
            lanes &= lanes - np.uint64(1)
            indices[found] = offset + i
            if past_cache:  # reading it back from memory would be slow
                sums[found] = scale * gradient[i] + keep * residual[i]
            else:
                sums[found] = out[i]
            found += 1
    for j in range(found):
        keys[j] &= _MAGNITUDE
    return -1 if full else found


# --- bounds: a sample, or histograms ---------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _place(j, n, log):
    run, within = (j * n) >> log, (j * _SPREAD) & 0xFFFF_FFFF  # divisions would take longer than the cache misses
    return run + ((within * (n >> log)) >> 32)


@njit(nogil=True, cache=True)
def sample(bits, log, keys):
    """One key from each of ``2 ** log`` runs of ``bits``, at places that depend on the sizes."""
    n = bits.shape[0]
    for j in range(keys.shape[0]):
        keys[j] = bits[_place(j, n, log)] & _MAGNITUDE


@njit(nogil=True, cache=True)
def sample_sum(gradient, residual, scale, keep, log, sums):
    """:func:`sample` of ``scale * gradient + keep * residual``, as floats."""
    n = gradient.shape[0]
    for j in range(sums.shape[0]):
        i = _place(j, n, log)
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
def fill(out, offset, indices, values, aligned):
    """Zero ``out`` and write ``values`` at ``indices - offset``.

    A block is made up in cache, then copied past it if ``out`` is ``aligned`` to 64 bytes. Returns how many were
    written: less than all if the indices do not increase strictly within ``out``.
    """
    n, m, j, before = out.shape[0], indices.shape[0], 0, -1
    block = np.zeros(BINS, np.float32)
    for start in range(0, n, BINS):
        stop, first = min(start + BINS, n), j
        while j < m:
            i = np.int64(indices[j]) - offset
            if i <= before or i >= stop:
                break
            block[i - start] = values[j]
            before = i
            j += 1
        if aligned and stop - start == BINS:
            for i in range(0, BINS, LANES):
                _stream(block, i, out, start + i)
        else:
            for i in range(start, stop):
                out[i] = block[i - start]
        for written in range(first, j):
            block[np.int64(indices[written]) - offset - start] = np.float32(0)
    return j

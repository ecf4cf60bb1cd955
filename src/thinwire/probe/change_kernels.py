# ruff: noqa: ARG001  Numba prescribes the parameters of an intrinsic
"""The loops that compare two arrays of cells, compiled by Numba; :mod:`thinwire.probe.changes` runs them.

What changed is found 64 cells at a time at memory speed; only changed cells are looked at one by one. Cells of at most
16 bits become numbers through a table of all of them, wider ones are seen through a second view of the same memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from thinwire.wire.values import ordered
from thinwire.wire.vector import LANES, differing_lanes, leading_zeros, ones, trailing_zeros

__all__ = ["BINS", "compare_narrow", "compare_wide", "follow_bytes", "squares_bf16", "squares_wide"]

BINS = 66
"""ULP distances 0, 1, 2, 3-4, 5-8, ... up to 2^64 - 1."""

COUNTS = 5  # cells changed, above all limits, of infinite or undefined difference, that became NaN, infinite
SUM, SUM_ABS, SUM_SQUARES, MAX_ABS = range(4)  # of ``sums``
_FINITE = 1.7976931348623157e308


# --- one byte a cell --------------------------------------------------------------------------------------------------


def _type_fold(typingctx: Any, cells: Any, kept: Any, fresh: Any, start: Any, flip: Any) -> Any:
    """Write the bytes of 64 cells from ``start`` on to ``fresh``; bit j is set where ``kept[start + j]`` differs.

    8 bits: the cell. 16 bits: the low byte of the integer in numeric order (``flip`` is 1 for floats, 0 for integers).
    32 and 64 bits: the low byte of a mixed hash.
    """
    signature = types.uint64(cells, kept, fresh, types.int64, types.int64)
    width = cells.dtype.bitwidth

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def pointer(array: int, index: Any, kind: Any) -> Any:
            data = context.make_array(sig.args[array])(context, builder, args[array]).data
            return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())

        def vector(bits: int) -> Any:
            return ir.VectorType(ir.IntType(bits), LANES)

        def all_of(bits: int, value: int) -> Any:
            return ir.Constant(vector(bits), [value] * LANES)

        cell = builder.load(pointer(0, args[3], vector(width)), align=width // 8)
        if width == 16:
            empty, lane = ir.Constant(vector(16), ir.Undefined), ir.IntType(32)
            first = builder.insert_element(empty, builder.trunc(args[4], ir.IntType(16)), ir.Constant(lane, 0))
            floats = builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(lane, LANES), [0] * LANES))
            mask = builder.mul(builder.ashr(cell, all_of(16, 15)), floats)
            cell = builder.xor(cell, mask)
        elif width >= 32:
            if width == 64:
                folded = builder.xor(cell, builder.lshr(cell, all_of(64, 32)))
                cell = builder.trunc(folded, vector(32))
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finaliser (Appleby 2011)
                cell = builder.xor(cell, builder.lshr(cell, all_of(32, shift)))
                cell = builder.mul(cell, all_of(32, factor))
            cell = builder.xor(cell, builder.lshr(cell, all_of(32, 16)))
        low = cell if width == 8 else builder.trunc(cell, vector(8))
        builder.store(low, pointer(2, ir.Constant(ir.IntType(64), 0), vector(8)), align=1)
        before = builder.load(pointer(1, args[3], vector(8)), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", low, before), ir.IntType(64))

    return signature, codegen


_fold: Any = intrinsic(_type_fold)


@njit(nogil=True, cache=True)
def _fold_cells(cells, kept, steps, hist, words, marking, flip, renew):
    n = cells.shape[0]
    fresh = np.empty(LANES, np.uint8)
    changed = 0
    for start in range(0, n, LANES):
        lanes = _fold(cells, kept, fresh, start, flip)
        if marking:
            words[start // LANES] = lanes
        if lanes == np.uint64(0):
            continue
        changed += ones(lanes)
        if not steps:
            if renew:
                for j in range(LANES):
                    kept[start + j] = fresh[j]
            continue
        while lanes != np.uint64(0):
            j = trailing_zeros(lanes)
            lanes &= lanes - np.uint64(1)
            step = np.int64(np.int8(fresh[j] - kept[start + j]))
            hist[np.int64(65) - leading_zeros(np.uint64(abs(step) - 1))] += 1
            if renew:
                kept[start + j] = fresh[j]
    return changed


def follow_bytes(cells: Any, kept: Any, hist: Any, words: Any, *, is_float: bool, renew: bool) -> int:
    """Count cells whose byte is not the ``kept`` one [n, uint8], and keep the new bytes if ``renew``.

    The ULP distances of 16-bit cells go to ``hist`` [66], taken modulo 256 into -128 to 127; those
    of other cells are not known. ``words`` [n / 64] takes one bit a cell, or is empty.
    """
    n, steps = cells.size, cells.itemsize == 2
    flip, marking = int(is_float), words.size > 0
    whole = n // LANES * LANES
    changed = int(_fold_cells(cells[:whole], kept[:whole], steps, hist, words, marking, flip, renew))
    if whole < n:  # the last cells, made up to 64 with cells that are as they were
        tail = np.zeros(LANES, cells.dtype)
        before = np.empty(LANES, np.uint8)
        _fold_cells(tail, before, False, hist, words[:0], False, flip, False)
        scratch = np.zeros(LANES, np.uint8)
        _fold_cells(tail, scratch, False, hist, words[:0], False, flip, True)  # the byte of a cell of zeros
        tail[: n - whole], scratch[: n - whole] = cells[whole:], kept[whole:]
        changed += int(_fold_cells(tail, scratch, steps, hist, words[whole // LANES :], marking, flip, renew))
        kept[whole:] = scratch[: n - whole]
    return changed


# --- all of a cell ----------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True, inline="always")
def _distance(before, after, flip, spare, signed):
    """How many representable numbers apart two cells are."""
    if signed:
        a, b = ordered(before, flip, spare), ordered(after, flip, spare)
        return np.uint64(b) - np.uint64(a) if b > a else np.uint64(a) - np.uint64(b)
    p, q = np.uint64(before), np.uint64(after)
    return q - p if q > p else p - q


@njit(nogil=True, cache=True, inline="always")
def _differing(old, new, start, count):
    if count == LANES:
        return differing_lanes(old, new, start)
    mask = np.uint64(0)
    for j in range(count):
        if old[start + j] != new[start + j]:
            mask |= np.uint64(1) << np.uint64(j)
    return mask


@njit(nogil=True, cache=True)
def _compare(old, new, x, y, narrow, flip, spare, signed, limits, ulps, counts, sums, hist, words, marking, renew):
    n = old.shape[0]
    changed = above = odd = new_nan = new_inf = 0
    total = total_abs = squares = largest = 0.0
    absolute, relative = limits[0], limits[1]
    for start in range(0, n, LANES):
        lanes = _differing(old, new, start, min(LANES, n - start))
        if marking:
            words[start // LANES] = lanes
        while lanes != np.uint64(0):
            i = start + trailing_zeros(lanes)
            lanes &= lanes - np.uint64(1)
            a = np.float64(x[np.int64(old[i])] if narrow else x[i])
            b = np.float64(y[np.int64(new[i])] if narrow else y[i])
            distance = _distance(old[i], new[i], flip, spare, signed)
            hist[np.int64(65) - leading_zeros(distance - np.uint64(1))] += 1
            step = b - a
            size = abs(step)
            changed += 1
            far = (absolute == 0.0 or not size <= absolute) and (relative == 0.0 or not size <= relative * abs(a))
            above += far and distance > ulps
            if size <= _FINITE:
                total += step
                total_abs += size
                squares += step * step
                largest = max(largest, size)
            else:
                odd += 1
                new_nan += np.isnan(b) and not np.isnan(a)
                new_inf += np.isinf(b) and not np.isinf(a)
            if renew:
                old[i] = new[i]
    for k, count in enumerate((changed, above, odd, new_nan, new_inf)):
        counts[k] += count
    sums[SUM] += total
    sums[SUM_ABS] += total_abs
    sums[SUM_SQUARES] += squares
    sums[MAX_ABS] = max(sums[MAX_ABS], largest)


def compare_narrow(old: Any, new: Any, table: Any, rules: Any, counts: Any, sums: Any, hist: Any, words: Any) -> None:
    """Add up what changed between cells of 8 or 16 bits, ``table`` [2^bits] holding their numbers in float32.

    ``rules``: (flip mask, spare bits, signed, limits [2], ULP limit, renew). ``counts`` int64 [5], ``sums`` float64 [4]
    and ``hist`` int64 [66] are added to; ``words`` [n / 64] takes one bit a cell, or is empty.
    """
    flip, spare, signed, limits, ulps, renew = rules
    fixed = (flip, spare, signed, limits, ulps, counts, sums, hist, words, words.size > 0, renew)
    _compare(old, new, table, table, True, *fixed)


def compare_wide(old: Any, new: Any, kind: Any, rules: Any, counts: Any, sums: Any, hist: Any, words: Any) -> None:
    """:func:`compare_narrow` for cells of 32 or 64 bits, which are numbers of NumPy's ``kind``."""
    flip, spare, signed, limits, ulps, renew = rules
    fixed = (flip, spare, signed, limits, ulps, counts, sums, hist, words, words.size > 0, renew)
    _compare(old, new, old.view(kind), new.view(kind), False, *fixed)


# --- norms ------------------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def squares_bf16(cells):
    """The sum of the squares of all finite bf16 numbers in ``cells`` [n, uint16], in float64."""
    total = 0.0
    for i in range(cells.shape[0]):
        bits = np.uint32(np.uint32(cells[i]) << np.uint32(16))
        finite = bits & np.uint32(0x7F800000) != np.uint32(0x7F800000)
        value = np.float64(np.uint32(bits if finite else 0).view(np.float32))
        total += value * value
    return total


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def squares_wide(values):
    """The sum of the squares of all finite ``values`` [n], in float64."""
    total = 0.0
    for i in range(values.shape[0]):
        value = np.float64(values[i])
        total += value * value if abs(value) <= _FINITE else 0.0
    return total

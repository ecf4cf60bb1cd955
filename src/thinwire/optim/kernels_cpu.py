# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, disable-error-code="call-arg"
"""The loops of sparse steps on the CPU, compiled by Numba: gather, update, scatter, in one pass over the active cells.

Weights and gradients come as cells (their bits), so that bfloat16 and float16, which NumPy or Numba lack, are read and
rounded here as torch rounds them. Sorted positions 64 or 128 ahead are asked for: they lie too far apart for the
processor to fetch them by itself. The readable versions are in :mod:`thinwire.optim.oracle`; the tests require equal
bits.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from thinwire.wire.vector import prefetch

__all__ = ["BF16", "F16", "F32", "absent", "adam", "gather", "importance", "pick", "sgd", "tally", "weave"]

F32, BF16, F16 = 0, 1, 2
_AHEAD = 128
_BLOCK = 32  # two vectors: the arithmetic of one block then runs while lines for later ones are on their way
_FAR = 64


@njit(nogil=True, cache=True, inline="always")
def _float(bits):
    return np.uint32(bits).view(np.float32)


@njit(nogil=True, cache=True, inline="always")
def _fused(a, b, c):
    """``a * b + c`` rounded once."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


@njit(nogil=True, cache=True, inline="always")
def _half_to_float(h):
    """IEEE half to single: shift the exponent by a product, which is exact for subnormals, too."""
    wide = np.uint32((np.uint32(h) & np.uint32(0x7FFF)) << np.uint32(13))
    if wide >= np.uint32(0x0F80_0000):  # infinity, NaN
        bits = np.uint32(wide + np.uint32(0x7000_0000))
    else:
        bits = np.float32(_float(wide) * np.float32(5.192296858534828e33)).view(np.uint32)  # 2^112
    return _float(bits | ((np.uint32(h) & np.uint32(0x8000)) << np.uint32(16)))


@njit(nogil=True, cache=True, inline="always")
def _float_to_half(x):
    """Single to IEEE half, to nearest, ties to even."""
    bits = np.float32(x).view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = np.uint32(bits & np.uint32(0x7FFF_FFFF))
    if size > np.uint32(0x7F80_0000):
        return np.uint16(sign | np.uint32(0x7E00))
    if size >= np.uint32(0x4780_0000):  # 65536 and more
        return np.uint16(sign | np.uint32(0x7C00))
    if size < np.uint32(0x3880_0000):  # subnormal: adding 0.5 rounds at the right bit
        total = np.float32(_float(size) + np.float32(0.5)).view(np.uint32)
        return np.uint16(sign | (total - np.uint32(0x3F00_0000)))
    odd = (size >> np.uint32(13)) & np.uint32(1)
    return np.uint16(sign | ((size - np.uint32(0x3800_0000) + np.uint32(0x0FFF) + odd) >> np.uint32(13)))


@njit(nogil=True, cache=True, inline="always")
def _load(cells, i, kind):
    if kind == F32:
        return _float(cells[i])
    if kind == BF16:
        return _float(np.uint32(cells[i]) << np.uint32(16))
    return _half_to_float(cells[i])


@njit(nogil=True, cache=True, inline="always")
def _store(cells, i, value, kind):
    bits = np.float32(value).view(np.uint32)
    if kind == F32:
        cells[i] = bits
    elif kind == F16:
        cells[i] = _float_to_half(value)
    elif (bits & np.uint32(0x7FFF_FFFF)) > np.uint32(0x7F80_0000):
        cells[i] = 0x7FC0
    else:
        cells[i] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@njit(nogil=True, cache=True)
def gather(cells, kind, positions, out):
    """``out[j]`` is the number in cell ``positions[j]``. Whether all are finite."""
    last = positions.shape[0] - 1
    odd = np.int64(0)
    for j in range(positions.shape[0]):
        prefetch(cells, np.int64(positions[min(j + _AHEAD, last)]))
        value = _load(cells, np.int64(positions[j]), kind)
        out[j] = value
        odd += (np.float32(value).view(np.uint32) & np.uint32(0x7F80_0000)) == np.uint32(0x7F80_0000)
    return odd == 0


@njit(nogil=True, cache=True, inline="always")
def _at(positions, j):
    return np.uint64(np.uint32(positions[j]))  # not negative: no wrapping round to look after


def _adam_for(kind, held):
    """The loop for one data type, with masters or without: where both are constants, all of it is straight vectors."""

    @njit(nogil=True, cache=True, error_model="numpy")
    def loop(cells, positions, gradient, m, v, entered, now, rates, corrections, numbers, masters, sign):
        rest1, beta2, rest2, eps, decay = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
        oldest, next_step = np.int32(rates.shape[0] - 1), np.int32(now + 1)
        w, rate, below = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
        for block in range(positions.shape[0] // _BLOCK):
            start = block * _BLOCK
            end = start + _BLOCK
            at, came, g, mb, vb = (
                positions[start:end], entered[start:end], gradient[start:end], m[start:end], v[start:end],
            )  # fmt: skip
            far = min(start + _FAR, positions.shape[0] - _BLOCK)
            ahead = positions[far : far + _BLOCK]
            for j in range(_BLOCK):
                prefetch(cells, np.int64(ahead[j]))
            for j in range(_BLOCK):
                age = np.uint64(np.uint32(min(np.int32(next_step - came[j]), oldest)))
                w[j] = masters[start + j] if held else _load(cells, _at(at, j), kind)
                rate[j] = rates[age]
                below[j] = corrections[age]
            for j in range(_BLOCK):  # nothing but arithmetic, for the processor's vectors
                x = sign * g[j]
                mj = _fused(rest1, x - mb[j], mb[j])
                vj = _fused(rest2 * x, x, vb[j] * beta2)
                mb[j] = mj
                vb[j] = vj
                w[j] = w[j] * decay - (rate[j] * mj) / (np.sqrt(vj) / below[j] + eps)
            for j in range(_BLOCK):
                _store(cells, _at(at, j), w[j], kind)
                if held:
                    masters[start + j] = w[j]

    return loop


_ADAM = {(kind, held): _adam_for(kind, held) for kind in (F32, BF16, F16) for held in (False, True)}


def adam(
    cells, kind, positions, gradient, m, v, entered, now, rates, corrections, numbers, masters, maximize
):  # fmt: skip
    """``numbers`` is float32: 1 - beta1, beta2, 1 - beta2, eps, decay."""
    held, count = masters.shape[0] > 0, positions.shape[0]
    loop, shared = _ADAM[kind, held], (now, rates, corrections, numbers)
    sign, whole = np.float32(-1 if maximize else 1), count // _BLOCK * _BLOCK
    if whole:
        loop(cells, positions, gradient, m, v, entered, *shared, masters, sign)
    rest = count - whole
    if rest:  # the last few in a block of their own, filled up with ones
        own = [np.ones(_BLOCK, x.dtype) for x in (cells, gradient, m, v, entered, masters)]
        mine = [x[whole:] for x in (gradient, m, v, entered, masters)]
        own[0][:rest] = cells[positions[whole:]]
        for filled, x in zip(own[1:], mine, strict=True):
            filled[: x.shape[0]] = x
        loop(own[0], np.arange(_BLOCK, dtype=np.int32), *own[1:5], *shared, own[5] if held else masters, sign)
        cells[positions[whole:]] = own[0][:rest]
        for filled, x in zip((own[2], own[3], own[5]), (mine[1], mine[2], mine[4]), strict=True):
            x[:] = filled[: x.shape[0]]


@njit(nogil=True, cache=True)
def sgd(cells, kind, positions, gradient, m, v, entered, now, numbers, nesterov, masters, maximize):
    """``numbers`` is float32: -lr, momentum, 1 - dampening, weight decay, beta2, 1 - beta2."""
    rate, momentum, rest, wd, beta2, rest2 = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]
    last, held = positions.shape[0] - 1, masters.shape[0] > 0
    for j in range(positions.shape[0]):
        prefetch(cells, np.int64(positions[min(j + _AHEAD, last)]))
        i = np.int64(positions[j])
        g = -gradient[j] if maximize else gradient[j]
        v[j] = _fused(rest2 * g, g, v[j] * beta2)
        w = masters[j] if held else _load(cells, i, kind)
        if wd != 0:
            g = _fused(wd, w, g)
        if momentum != 0:
            m[j] = g if np.int64(entered[j]) == now else _fused(rest, g, m[j] * momentum)
            g = _fused(momentum, m[j], g) if nesterov else m[j]
        new = _fused(rate, g, w)
        _store(cells, i, new, kind)
        if held:
            masters[j] = new


@njit(nogil=True, cache=True)
def tally(cells, shift, mask, counts):
    """Count cells by their leading bits without the sign; four rows of ``counts``, for neighbours are often alike."""
    for i in range(cells.shape[0]):
        counts[i & 3, (np.uint32(cells[i]) & mask) >> shift] += 1


@njit(nogil=True, cache=True, error_model="numpy")
def importance(v, entered, now, corrections, factor, out):
    """``sqrt(v)``, corrected for each cell's own age, times ``factor``."""
    next_step, oldest = np.int64(now) + 1, np.int64(corrections.shape[0] - 1)
    for j in range(v.shape[0]):
        out[j] = corrections[np.uint64(min(next_step - np.int64(entered[j]), oldest))]
    for j in range(v.shape[0]):
        out[j] = np.sqrt(v[j]) / out[j] * factor


@njit(nogil=True, cache=True)
def absent(of, positions, out):
    """Which of ``positions`` are not among those of ``of`` (both increase strictly), in ``out``; how many."""
    i, count, end = 0, 0, of.shape[0]
    for j in range(positions.shape[0]):
        p = positions[j]
        while i < end and of[i] < p:
            i += 1
        out[count] = p
        count += not (i < end and of[i] == p)
    return count


@njit(nogil=True, cache=True)
def weave(positions, stay, new, out, source):
    """``positions`` that ``stay`` and ``new`` ones in order; where each comes from: its place there, or -1 less its
    place among the new."""
    i, j, count = 0, 0, positions.shape[0]
    for at in range(out.shape[0]):
        while i < count and not stay[i]:
            i += 1
        if j == new.shape[0] or (i < count and positions[i] < new[j]):
            out[at] = positions[i]
            source[at] = i
            i += 1
        else:
            out[at] = new[j]
            source[at] = -1 - j
            j += 1


@njit(nogil=True, cache=True)
def pick(old, added, source, out):
    """One array of values that goes with :func:`weave`."""
    for at in range(source.shape[0]):
        i = np.int64(source[at])
        out[at] = old[i] if i >= 0 else added[-1 - i]

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, disable-error-code="assignment"
"""Loops of the benchmarks, compiled by Numba: what the peers' formats and the simulated trainer need."""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["adam_step", "round_to_bf16", "scatter", "scatter_xor", "short_gaps"]


@njit(nogil=True, cache=True)
def round_to_bf16(weights, cells):
    """Round fp32 weights to the nearest bf16, ties to even; ``cells`` takes their bits."""
    bits = weights.view(np.uint32)
    for i in range(cells.shape[0]):
        cells[i] = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@njit(nogil=True, cache=True)
def adam_step(w, m, v, g, beta1, beta2, rate, correction, eps):
    """One Adam step; ``rate`` is lr / (1 - beta1^t) and ``correction`` 1 / (1 - beta2^t)."""
    one = np.float32(1)
    for i in range(w.shape[0]):
        m[i] = beta1 * m[i] + (one - beta1) * g[i]
        v[i] = beta2 * v[i] + (one - beta2) * g[i] * g[i]
        w[i] -= rate * m[i] / (np.sqrt(v[i] * correction) + eps)


@njit(nogil=True, cache=True)
def scatter(cells, positions, values):
    """Write ``values`` to ``positions``."""
    for k in range(positions.shape[0]):
        cells[np.int64(positions[k])] = values[k]


@njit(nogil=True, cache=True)
def short_gaps(positions, values, old, gaps, xors):
    """16-bit gaps and XOR values; a gap that is too long passes over a cell that stays (its XOR is 0)."""
    count = 0
    following = 0
    for k in range(positions.shape[0]):
        position = np.int64(positions[k])
        while position - following > 65535:
            gaps[count] = 65535
            xors[count] = 0
            count += 1
            following += 65536
        gaps[count] = position - following
        xors[count] = values[k] ^ old[position]
        count += 1
        following = position + 1
    return count


@njit(nogil=True, cache=True)
def scatter_xor(cells, gaps, xors):
    """The inverse of :func:`short_gaps`, in place."""
    at = 0
    for k in range(gaps.shape[0]):
        at += np.int64(gaps[k])
        cells[at] ^= xors[k]
        at += 1

"""Sparsifying task vectors that are sparse already, as the dense methods would.

A density counts cells of the *dense* task vector, unchanged ones included, as in mergekit and PEFT: a fine-tune that
changed 1 % of its weights is left as it is by any density from 0.01 on. Ties are broken by position, the lowest first
(the libraries leave them to an unstable sort).

>>> values = np.array([3.0, -1.0, 2.0], np.float32)
>>> magnitude(values, size=10, density=0.2).tolist()
[True, False, True]
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["magnitude", "magnitude_outliers", "random", "rank_probabilities", "rescale_l1", "uniforms"]

Floats = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]

_RESCALE_EPS = 1e-7  # mergekit's: vectors this small are not rescaled


def largest(values: Floats, count: int) -> Mask:
    """Marks the ``count`` largest magnitudes."""
    if count >= values.size:
        return np.ones(values.size, np.bool_)
    if count <= 0:
        return np.zeros(values.size, np.bool_)
    sizes = np.abs(values)
    threshold = np.partition(sizes, values.size - count)[values.size - count]
    keep: Mask = sizes > threshold
    ties = np.flatnonzero(sizes == threshold)
    keep[ties[: count - int(keep.sum())]] = True
    return keep


def magnitude(values: Floats, *, size: int, density: float, least: int = 1) -> Mask:
    """Marks the largest ``int(density * size)`` magnitudes, at least ``least`` (mergekit: 1, PEFT: 0).

    TIES's trim (Yadav et al. 2023, arXiv:2306.01708). ``values`` are the nonzero ones of a vector of ``size``.
    """
    if density >= 1:
        return np.ones(values.size, np.bool_)
    return largest(values, max(least, int(density * size)) if density > 0 else 0)


def magnitude_outliers(values: Floats, *, size: int, density: float, gamma: float) -> Mask:
    """Leaves out the largest ``int(gamma * size)`` magnitudes and then the smallest, down to the density.

    Model Breadcrumbs (Davari and Belilovsky 2023, arXiv:2312.06795), with mergekit's counts: outliers stay in as far as
    the density would not be reached without them.
    """
    if density >= 1:
        return np.ones(values.size, np.bool_)
    target = int(density * size)
    bottom = max(0, size - target - int(gamma * size)) - (size - values.size)  # unchanged cells are the smallest
    order = np.argsort(np.abs(values), kind="stable")
    keep = np.zeros(values.size, np.bool_)
    keep[order[max(bottom, 0) : max(bottom + target, 0)]] = True
    return keep


@njit(nogil=True, cache=True)
def _uniforms(positions, key, out):
    for i in range(positions.shape[0]):  # SplitMix64 (Steele, Lea and Flood 2014) of a counter
        z = key + (np.uint64(positions[i]) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * (1.0 / (1 << 53))


def uniforms(positions: npt.NDArray[np.signedinteger], *, seed: int, task: int, tensor: str) -> npt.NDArray[np.float64]:
    """A number from [0, 1) for each position: a function of seed, task, tensor and position alone.

    So the same weights are dropped whatever else is merged, in whatever order and on however many threads.
    """
    text = f"{seed}\n{task}\n{tensor}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"thinwire.merge").digest(), "little")
    out = np.empty(positions.size, np.float64)
    _uniforms(positions, np.uint64(key), out)
    return out


def random(numbers: npt.NDArray[np.float64], *, density: float) -> Mask:
    """DARE's drop (Yu et al. 2023, arXiv:2311.03099): each entry stays with probability ``density``."""
    return numbers < density


def rank_probabilities(
    values: Floats, positions: npt.NDArray[np.signedinteger], shape: tuple[int, ...], *, density: float, epsilon: float
) -> npt.NDArray[np.float64]:
    """DELLA's probability of staying (Deep et al. 2024, arXiv:2406.11617): from ``density - epsilon`` for the smallest
    magnitude of a row to ``density + epsilon`` for its largest, even in rank.

    Rows lie along the second axis, as in mergekit; a tensor of one axis is one row. A row of one cell gets ``density``.
    """
    shape = (1, *shape) if len(shape) < 2 else shape
    inner = math.prod(shape[2:])
    where = positions.astype(np.int64)
    rows = where // (shape[1] * inner) * inner + where % inner
    order = np.lexsort((np.arange(values.size), np.abs(values), rows))
    if not order.size:
        return np.empty(0, np.float64)
    ordered_rows = rows[order]
    starts = np.flatnonzero(np.r_[True, ordered_rows[1:] != ordered_rows[:-1]])
    lengths = np.diff(np.r_[starts, order.size])
    within = np.arange(order.size) - np.repeat(starts, lengths)  # rank among the changed cells of the row
    rank = shape[1] - np.repeat(lengths, lengths) + within  # unchanged cells rank below them
    share = rank / (shape[1] - 1) if shape[1] > 1 else np.full(order.size, 0.5)
    out = np.empty(order.size, np.float64)
    out[order] = (density - epsilon) + share * 2 * epsilon
    return out


def rescale_l1(values: Floats, keep: Mask) -> float:
    """The factor that gives the kept values the sum of magnitudes that all had; 1 where there is too little of it."""
    before = float(np.abs(values).sum(dtype=np.float64))
    after = float(np.abs(values[keep]).sum(dtype=np.float64))
    return 1.0 if before < _RESCALE_EPS or after < _RESCALE_EPS else before / after

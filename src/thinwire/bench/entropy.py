"""What no code without other knowledge can beat: the entropy of positions and steps, with and without the exponents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thinwire.bench.weights import STRIPE, Cells
from thinwire.wire.context import Histogram
from thinwire.wire.spec import DTYPES
from thinwire.wire.values import steps

__all__ = ["Entropy", "entropy_of"]


@dataclass(frozen=True, slots=True)
class Entropy:
    """Bytes per changed element, of independent draws with the frequencies found.

    ``plain`` knows the share of changed elements and the distribution of steps; ``exponent`` knows both for each
    exponent of the old weight. Tables of frequencies are not counted.
    """

    changed: int
    plain: float
    exponent: float


def _sum_bits(counts: npt.NDArray[np.int64]) -> float:
    """Bits of as many draws as ``counts`` adds up to, along the last axis, summed over the others."""
    total = counts.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(counts > 0, counts * np.log2(total / counts), 0.0)
    return float(bits.sum())


def entropy_of(old: Cells, new: Cells) -> Entropy:
    """Entropy of the step from ``old`` to ``new``: bf16 cells, 1-d.

    >>> old = np.zeros(1 << 16, np.uint16)
    >>> new = old.copy()
    >>> new[::2] = 1
    >>> entropy_of(old, new)  # one bit a cell, which says nothing of the step: it is always the same
    Entropy(changed=32768, plain=0.25, exponent=0.25)
    """
    histogram = Histogram(DTYPES["BF16"])
    values = np.zeros((256, 1 << 16), np.int64)
    for at in range(0, old.size, STRIPE):
        before, after = old[at : at + STRIPE], new[at : at + STRIPE]
        histogram.add(before, after, stride=1)
        where = np.flatnonzero(before != after)
        codes = steps(before[where], after[where], is_float=True).astype(np.int64)
        exponents = (before[where] & 0x7FFF).astype(np.int64) >> 7
        values += np.bincount(exponents << 16 | codes, minlength=values.size).reshape(values.shape)
    changed = int(histogram.changed.sum())
    if not changed:
        return Entropy(0, 0.0, 0.0)
    split = np.stack([histogram.changed, histogram.everything - histogram.changed], axis=-1)
    plain = _sum_bits(split.sum(axis=0)) + _sum_bits(values.sum(axis=0))
    known = _sum_bits(split) + _sum_bits(values)
    return Entropy(changed, plain / 8 / changed, known / 8 / changed)

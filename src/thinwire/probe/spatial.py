"""Whether the changed elements of a matrix lie in rows, columns or heads, or anywhere.

If positions were random, a row's count of changes would be hypergeometric; where changes prefer rows, the counts vary
more. :class:`Pattern` gives the variance of the counts over the expected one (1: random; more: structured) and a
p-value by permutation. Two kinds of random positions are compared with:

- ``uniform``: anywhere in the matrix;
- ``within_exponent``: anywhere among the elements of the same exponent. Small weights change more often, whatever is
  learnt, and rows of small weights look structured for that alone: this is the honest null.

The draws are of counts (multivariate hypergeometric), not of positions, so their cost does not follow the matrix.

>>> import torch
>>> weights = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
>>> changed = torch.zeros(60, 40, dtype=torch.bool)
>>> changed[5] = changed[20] = True
>>> found = structure_of(mask_words(changed), weights)
>>> found.rows.within_exponent.p_value < 0.01, found.columns.within_exponent.p_value > 0.01
(True, True)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.probe.changes import Words
from thinwire.tensors.bits import cells_of, dtype_of_tensor

__all__ = ["Axis", "Pattern", "Structure", "mask_words", "structure_of"]

Counts = npt.NDArray[np.int64]

_CELLS_MAX = 1_000_000_000  # of NumPy's multivariate hypergeometric
_BLOCK = 1 << 22  # elements that are looked at at a time; a multiple of 64


@dataclass(frozen=True, slots=True)
class Pattern:
    """``dispersion``: the variance of counts over the one expected of random positions; NaN where that is 0.
    ``p_value``: the share of random draws that vary at least as much, the observed one among them."""

    dispersion: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Axis:
    """The changes in each row (column, head): ``counts`` [n] of ``sizes`` [n] elements, against two kinds of chance."""

    counts: Counts
    sizes: Counts
    uniform: Pattern
    within_exponent: Pattern


@dataclass(frozen=True, slots=True)
class Structure:
    """Where the changed elements of a matrix lie; ``heads`` is None where their number was not given."""

    elements: int
    changed: int
    rows: Axis
    columns: Axis
    heads: Axis | None = None


def mask_words(mask: Tensor) -> Words:
    """A bool tensor as words of 64 bits, the lowest first."""
    bits = mask.reshape(-1).cpu().numpy()
    padded = np.zeros(-(-bits.size // 64) * 64, np.bool_)
    padded[: bits.size] = bits
    return np.packbits(padded, bitorder="little").view(np.uint64)


def _classes(part: Tensor) -> tuple[npt.NDArray[np.int64], int]:
    """The exponents of floats, 0 of integers, and how many there can be."""
    dtype = dtype_of_tensor(part)
    cells = cells_of(part)
    if not dtype.is_float:
        return np.zeros(cells.size, np.int64), 1
    magnitude = (1 << (8 * dtype.cell_bytes - 1)) - 1
    exponents = (cells & cells.dtype.type(magnitude)) >> cells.dtype.type(dtype.mantissa_bits)
    return exponents.astype(np.int64), 1 << dtype.exponent_bits


def _tables(words: Words, matrix: Tensor) -> tuple[list[Counts], list[Counts]]:
    """By exponent class and row, by exponent class and column: the elements, and those that changed."""
    rows, columns = matrix.shape
    classes = _classes(matrix[:0])[1]
    sizes = [np.zeros((classes, n), np.int64) for n in (rows, columns)]
    changed = [np.zeros((classes, n), np.int64) for n in (rows, columns)]
    flat = matrix.reshape(-1)
    for first in range(0, flat.numel(), _BLOCK):
        last = min(first + _BLOCK, flat.numel())
        kinds, _ = _classes(flat[first:last])
        marks = words[first // 64 : -(-last // 64)].view(np.uint8)
        marked = np.flatnonzero(np.unpackbits(marks, count=last - first, bitorder="little"))
        row, column = np.divmod(np.arange(first, last), columns)
        for axis, at, length in ((0, row, rows), (1, column, columns)):
            place = kinds * length + at
            for table, chosen in ((sizes, place), (changed, place[marked])):
                table[axis] += np.bincount(chosen, minlength=classes * length).reshape(classes, length)
    used = sizes[0].sum(axis=1) > 0
    return [table[used] for table in sizes], [table[used] for table in changed]


def _pattern(sizes: Counts, changed: Counts, random: np.random.Generator, permutations: int) -> Pattern:
    """Of changes [classes, n] among elements [classes, n], against random places within each class."""
    totals, drawn = sizes.sum(axis=1), changed.sum(axis=1)
    useful = (drawn > 0) & (drawn < totals)
    sizes, changed, totals, drawn = sizes[useful], changed[useful], totals[useful], drawn[useful]
    share = (drawn / np.maximum(totals, 1))[:, None]
    expected = (sizes * share).sum(axis=0)
    rest = ((totals[:, None] - sizes) / np.maximum(totals - 1, 1)[:, None]) * (1 - share)
    variance = float((sizes * share * rest).sum())
    if variance <= 0:
        return Pattern(float("nan"), 1.0)
    observed = float(np.square(changed.sum(axis=0) - expected).sum())
    counts = np.zeros((permutations, sizes.shape[1]), np.int64)
    for size, count in zip(sizes, drawn, strict=True):
        counts += random.multivariate_hypergeometric(size, int(count), size=permutations, method="marginals")
    varied = np.square(counts - expected).sum(axis=1)
    at_least = int((varied >= observed * (1 - 1e-12)).sum())
    return Pattern(observed / variance, (1 + at_least) / (1 + permutations))


def _axis(sizes: Counts, changed: Counts, random: np.random.Generator, permutations: int) -> Axis:
    whole, marked = sizes.sum(axis=0, keepdims=True), changed.sum(axis=0, keepdims=True)
    uniform = _pattern(whole, marked, random, permutations)
    return Axis(marked[0], whole[0], uniform, _pattern(sizes, changed, random, permutations))


def structure_of(
    words: Words, weights: Tensor, *, heads: int | None = None, permutations: int = 199, seed: int = 0
) -> Structure:
    """Whether the elements marked in ``words`` lie in rows, columns or heads of ``weights`` [rows, columns].

    Further dimensions count as columns. ``heads`` splits the rows into so many equal groups (for an output projection,
    give the transposed matrix and mask). p-values are at least 1 / (1 + permutations).

    Raises:
        MisuseError: no matrix, words of another length, rows that do not divide into heads, 10^9 elements or more.
    """
    if weights.dim() < 2 or not weights.numel():
        raise MisuseError(f"only matrices have rows and columns, not {tuple(weights.shape)}")
    if words.size != -(-weights.numel() // 64):
        raise MisuseError(f"{weights.numel()} elements take {-(-weights.numel() // 64)} words, not {words.size}")
    if weights.numel() >= _CELLS_MAX or permutations < 1:
        raise MisuseError("give a matrix of less than 10^9 elements (some of the rows), and at least one permutation")
    matrix = weights.detach().reshape(weights.shape[0], -1)
    if heads is not None and (heads < 1 or matrix.shape[0] % heads):
        raise MisuseError(f"{matrix.shape[0]} rows do not divide into {heads} heads")
    random = np.random.default_rng(seed)
    sizes, changed = _tables(words, matrix)
    rows, columns = (_axis(sizes[k], changed[k], random, permutations) for k in (0, 1))
    by_head = None
    if heads is not None:
        grouped = [table[0].reshape(table[0].shape[0], heads, -1).sum(axis=2) for table in (sizes, changed)]
        by_head = _axis(grouped[0], grouped[1], random, permutations)
    return Structure(matrix.numel(), int(rows.counts.sum()), rows, columns, by_head)

"""Hot/cold context: the receiver's own exponents tell which weights are likely to have changed.

A weight with a small exponent has a small unit in the last place, so almost every optimiser step moves it; a large one
hardly ever moves. Cells with a biased exponent at or below a threshold are *hot*: they are sorted into classes by
exponent, and a hot change is written as the number of unchanged hot cells *of its class* before it. The other cells are
*cold* and keep plain gaps over all cells. Both sides compute the classes from the base, which they hold.

Hot cells are found 64 at a time by one vectorised compare, so that the cost follows their number. Classes are given by
``bounds``: class ``k`` holds the exponents from ``bounds[k - 1] + 1`` (0 for the first) to ``bounds[k]``; the last
bound is the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from thinwire.errors import MalformedError
from thinwire.wire.spec import CLASSES_MAX, DType
from thinwire.wire.vector import LANES, hot_lanes, ones, trailing_zeros

__all__ = ["COLD", "ContextReader", "ContextWriter", "Histogram", "choose_bounds"]

COLD = 255
Cells = npt.NDArray[np.unsignedinteger]

_HOT_CELL_BITS = 0.05  # what visiting one hot cell must save to be worth its time
_CLASS_BITS = 160.0  # what the tables of one more class cost


@njit(nogil=True, cache=True)
def _hot_of(cells, start, count, magnitude, limit):
    if count == LANES:
        return hot_lanes(cells, start, magnitude, limit)
    mask = np.uint64(0)
    for j in range(count):
        if cells[start + j] & magnitude < limit:
            mask |= np.uint64(1) << np.uint64(j)
    return mask


@njit(nogil=True, cache=True)
def _write(cells, offset, magnitude, limit, shift, classes_of, positions, index, last, counters, cold, classes, gaps):
    """Fill ``classes`` and ``gaps`` for the changes ``index..last`` that lie in ``cells`` (from ``offset`` on).

    ``counters`` holds the unchanged hot cells of each class since its last change; ``cold`` is the position after the
    last cold change. Returns the new ``cold``.
    """
    n = cells.shape[0]
    for start in range(0, n, LANES):
        count = min(LANES, n - start)
        hot = _hot_of(cells, start, count, magnitude, limit)
        first = index
        changed = np.uint64(0)
        while index < last and np.int64(positions[index]) < offset + start + count:
            changed |= np.uint64(1) << np.uint64(np.int64(positions[index]) - offset - start)
            index += 1
        rest = changed & ~hot
        while rest != np.uint64(0):
            j = trailing_zeros(rest)
            rest &= rest - np.uint64(1)
            i = first + ones(changed & ((np.uint64(1) << np.uint64(j)) - np.uint64(1)))
            classes[i] = COLD
            gaps[i] = offset + start + j - cold
            cold = offset + start + j + 1
        i = first
        while hot != np.uint64(0):
            j = trailing_zeros(hot)
            hot &= hot - np.uint64(1)
            k = classes_of[np.int64(cells[start + j] & magnitude) >> shift]
            if (changed >> np.uint64(j)) & np.uint64(1):
                i = first + ones(changed & ((np.uint64(1) << np.uint64(j)) - np.uint64(1)))
                classes[i] = k
                gaps[i] = counters[k]
                counters[k] = 0
            else:
                counters[k] += 1
    return cold


@njit(nogil=True, cache=True)
def _read(
    cells, offset, magnitude, limit, shift, classes_of, waiting, ends, at, hot_gaps, hot_codes,
    cold_positions, cold_codes, cold_at, positions, codes, found,
):  # fmt: skip
    """Merge hot and cold changes of ``cells`` into ``positions`` and ``codes``; returns (found, cold_at), -1 if bad."""
    n = cells.shape[0]
    total = positions.shape[0]
    cold_total = cold_positions.shape[0]
    held = np.empty(LANES, codes.dtype)
    for start in range(0, n, LANES):
        count = min(LANES, n - start)
        hot = _hot_of(cells, start, count, magnitude, limit)
        changed = np.uint64(0)
        rest = hot
        while rest != np.uint64(0):
            j = trailing_zeros(rest)
            rest &= rest - np.uint64(1)
            k = classes_of[np.int64(cells[start + j] & magnitude) >> shift]
            if waiting[k] == 0:
                changed |= np.uint64(1) << np.uint64(j)
                held[j] = hot_codes[at[k]]
                at[k] += 1
                waiting[k] = np.int64(hot_gaps[at[k]]) if at[k] < ends[k] else np.int64(-1)
            else:
                waiting[k] -= 1
        while cold_at < cold_total and np.int64(cold_positions[cold_at]) < offset + start + count:
            j = np.int64(cold_positions[cold_at]) - offset - start
            bit = np.uint64(1) << np.uint64(j)
            if hot & bit:
                return -1, cold_at
            changed |= bit
            held[j] = cold_codes[cold_at]
            cold_at += 1
        while changed != np.uint64(0):
            j = trailing_zeros(changed)
            changed &= changed - np.uint64(1)
            if found >= total:
                return -1, cold_at
            positions[found] = offset + start + j
            codes[found] = held[j]
            found += 1
    return found, cold_at


@njit(nogil=True, cache=True)
def _count_exponents(old, new, magnitude, shift, stride, everything, changed):
    n = old.shape[0]
    for start in range(0, n, LANES * stride):
        for i in range(start, min(start + LANES, n)):
            e = np.int64(old[i] & magnitude) >> shift
            everything[e] += 1
            changed[e] += old[i] != new[i]


@dataclass(frozen=True, slots=True)
class _Lookup:
    magnitude: np.unsignedinteger
    limit: np.unsignedinteger
    shift: int
    classes_of: npt.NDArray[np.uint8]


def _lookup(dtype: DType, bounds: tuple[int, ...]) -> _Lookup:
    exponents = 1 << dtype.exponent_bits
    if not bounds or len(bounds) > CLASSES_MAX or list(bounds) != sorted(set(bounds)) or bounds[-1] >= exponents - 1:
        raise MalformedError(f"context classes {bounds[:4]}... do not fit {dtype.name}", bounds=bounds[:4])
    scalar = dtype.cells.type
    classes_of = np.full(exponents, COLD, np.uint8)
    start = 0
    for k, bound in enumerate(bounds):
        classes_of[start : bound + 1] = k
        start = bound + 1
    magnitude = scalar((1 << (8 * dtype.cell_bytes - 1)) - 1)
    return _Lookup(magnitude, scalar((bounds[-1] + 1) << dtype.mantissa_bits), dtype.mantissa_bits, classes_of)


class Histogram:
    """How many cells, and how many changed ones, have each biased exponent; of a sample of the cells."""

    def __init__(self, dtype: DType) -> None:
        self.dtype = dtype
        self.everything = np.zeros(1 << dtype.exponent_bits, np.int64)
        self.changed = np.zeros(1 << dtype.exponent_bits, np.int64)

    def add(self, old: Cells, new: Cells, *, stride: int) -> None:
        """Count every ``stride``-th run of 64 cells of ``old`` and ``new`` (1-d, of one length)."""
        magnitude = self.dtype.cells.type((1 << (8 * self.dtype.cell_bytes - 1)) - 1)
        _count_exponents(old, new, magnitude, self.dtype.mantissa_bits, stride, self.everything, self.changed)


def _position_bits(cells: npt.NDArray[np.float64], changed: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Entropy in bits of which ``changed`` of ``cells`` changed, elementwise."""
    p = np.clip(changed / np.maximum(cells, 1), 1e-12, 1 - 1e-12)
    bits: npt.NDArray[np.float64] = -cells * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return bits


def choose_bounds(histogram: Histogram, *, scale: float = 1.0) -> tuple[int, ...]:
    """The classes that code the sampled changes best; empty if plain gaps do.

    ``scale`` is the number of cells that one sampled cell stands for. Neighbouring exponents share a class until it is
    worth its tables.
    """
    n = histogram.everything.astype(np.float64) * scale
    c = histogram.changed.astype(np.float64) * scale
    plain = float(_position_bits(n.sum(), c.sum()))
    apart = np.cumsum(_position_bits(n, c))
    cold = _position_bits(np.full(n.size, n.sum()), c.sum() - np.cumsum(c))
    cost = (apart + cold + _HOT_CELL_BITS * np.cumsum(n))[:-1]
    threshold = int(np.argmin(cost))
    if cost[threshold] + _CLASS_BITS > plain or c[: threshold + 1].sum() == 0:
        return ()
    bounds: list[int] = []
    start = 0
    for exponent in range(threshold + 1):
        remaining = c[exponent + 1 : threshold + 1].sum()
        enough = c[start : exponent + 1].sum() * 1.5 > _CLASS_BITS and remaining * 1.5 > _CLASS_BITS
        if exponent == threshold or (enough and len(bounds) < CLASSES_MAX - 1):
            bounds.append(exponent)
            start = exponent + 1
    return tuple(bounds)


class ContextWriter:
    """Turns changed positions into (class, gap) pairs, fed with the base in order.

    The base of a segment is given piece by piece, each before its own cells are overwritten.
    """

    def __init__(self, dtype: DType, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self._lookup = _lookup(dtype, bounds)
        self._counters = np.zeros(len(bounds), np.int64)
        self._cold = 0

    def add(
        self,
        base: Cells,
        offset: int,
        positions: npt.NDArray[np.uint32],
        first: int,
        last: int,
        classes: npt.NDArray[np.uint8],
        gaps: npt.NDArray[np.uint32],
    ) -> None:
        """Fill ``classes[first:last]`` and ``gaps[first:last]`` for ``positions[first:last]``.

        Those are the changes inside ``base``, whose first cell has position ``offset`` in the segment.
        """
        look = self._lookup
        self._cold = _write(
            base, offset, look.magnitude, look.limit, look.shift, look.classes_of,
            positions, first, last, self._counters, self._cold, classes, gaps,
        )  # fmt: skip


class ContextReader:
    """The inverse of :class:`ContextWriter`: from the streams of each class to positions and codes.

    ``gaps`` and ``codes`` hold one array a class; ``cold_positions`` are the positions of the cold changes, already
    checked against the segment.
    """

    def __init__(
        self,
        dtype: DType,
        bounds: tuple[int, ...],
        gaps: list[npt.NDArray[np.uint32]],
        codes: list[Cells],
        cold_positions: npt.NDArray[np.uint32],
        cold_codes: Cells,
    ) -> None:
        self._lookup = _lookup(dtype, bounds)
        counts = np.array([g.size for g in gaps], np.int64)
        self._ends = np.cumsum(counts)
        self._at = self._ends - counts
        self._gaps = np.concatenate(gaps)
        self._codes = np.concatenate(codes)
        self._waiting = np.array([int(g[0]) if g.size else -1 for g in gaps], np.int64)
        self._cold_positions, self._cold_codes, self._cold_at = cold_positions, cold_codes, 0
        total = int(counts.sum()) + cold_positions.size
        self.positions = np.empty(total, np.uint32)
        self.codes = np.empty(total, dtype.cells)
        self._found = 0

    def add(self, base: Cells, offset: int) -> None:
        """Take the next piece of the base, whose first cell has position ``offset`` in the segment.

        Raises:
            MalformedError: the streams do not fit this base.
        """
        look = self._lookup
        found, self._cold_at = _read(
            base, offset, look.magnitude, look.limit, look.shift, look.classes_of,
            self._waiting, self._ends, self._at, self._gaps, self._codes,
            self._cold_positions, self._cold_codes, self._cold_at, self.positions, self.codes, self._found,
        )  # fmt: skip
        if found < 0:
            raise MalformedError("changed positions do not fit the base; the patch is damaged or of another base")
        self._found = found

    def finish(self) -> None:
        """Check that every change was placed.

        Raises:
            MalformedError: some were not.
        """
        if self._found != self.positions.size:
            raise MalformedError(
                f"{self.positions.size - self._found} changes found no place; the patch is damaged or of another base"
            )

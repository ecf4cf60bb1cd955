"""Combining sparse vectors position by position: one pass over the changed cells of all tasks, in order of position.

Absent entries are zeros of the dense task vectors. What each reduction computes is written out, on dense vectors, in
:mod:`thinwire.merge.oracle`; the tests require equality.

>>> a = Vector(np.array([0, 2], np.int32), np.array([1, 4], np.float32), np.array([0, 0], np.uint32))
>>> b = Vector(np.array([2, 3], np.int32), np.array([-2, 5], np.float32), np.array([0, 0], np.uint32))
>>> total = reduce([a, b], [1.0, 0.5])
>>> total.positions.tolist(), total.values.tolist()
([0, 2, 3], [1.0, 3.0, 2.5])
>>> reduce([a, b], [1.0, 0.5], vote="weighted", divide="weights").values.tolist()  # TIES: at 2, a wins
[1.0, 4.0, 5.0]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numba import njit

from thinwire.merge.blocks import reduce_blocks

__all__ = ["Counts", "Vector", "count_overlap", "reduce", "reduce_changed", "reduce_in_turn", "variances"]

Cells = npt.NDArray[np.unsignedinteger]
Floats = npt.NDArray[np.floating]
Vote = Literal["all", "weighted", "total", "frequency"]
Divide = Literal["nothing", "weights", "count", "weights_clamped"]

_VOTES = {"all": 0, "weighted": 1, "total": 2, "frequency": 3}
_DIVIDES = {"nothing": 0, "weights": 1, "count": 2, "weights_clamped": 3}
_NO_POSITION = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Vector:
    """A sparse vector: ``positions`` [n], strictly increasing, ``values`` [n], and the base's ``cells`` [n] there."""

    positions: npt.NDArray[np.signedinteger]
    values: Floats
    cells: Cells

    def where(self, keep: npt.NDArray[np.bool_]) -> Vector:
        """The entries that ``keep`` [n] marks."""
        return self if keep.all() else Vector(self.positions[keep], self.values[keep], self.cells[keep])

    def scaled(self, factor: float) -> Vector:
        """All values times ``factor``, in the values' own precision."""
        return self if factor == 1 else Vector(self.positions, self.values * self.values.dtype.type(factor), self.cells)


@dataclass(frozen=True, slots=True)
class Counts:
    """How the changes of tasks meet: entries [tasks] that others share, that are unique; positions of opposite signs.

    ``pairs`` [tasks, tasks] counts the positions that two tasks share, ``conflicts`` [tasks, tasks] those of them with
    opposite signs; ``union`` and ``conflicting`` count positions.
    """

    shared: npt.NDArray[np.int64]
    unique: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    conflicts: npt.NDArray[np.int64]
    union: int
    conflicting: int


@njit(nogil=True, cache=True, inline="always")
def _gather(positions, starts, cursors, tasks, entries):
    """The entries at the lowest position not yet visited, in the order of the tasks. Returns how many, and where."""
    lowest = np.int64(_NO_POSITION)
    for t in range(cursors.shape[0]):
        if cursors[t] < starts[t + 1]:
            lowest = min(lowest, np.int64(positions[cursors[t]]))
    held = 0
    for t in range(cursors.shape[0]):
        if cursors[t] < starts[t + 1] and np.int64(positions[cursors[t]]) == lowest:
            tasks[held] = t
            entries[held] = cursors[t]
            cursors[t] += 1
            held += 1
    return held, lowest


@njit(nogil=True, cache=True)
def _reduce(positions, values, starts, weights, numbers, tiny, vote, divide, out_positions, out_values, out_entries):
    count = starts.shape[0] - 1
    cursors, tasks, entries = starts[:-1].copy(), np.empty(count, np.int64), np.empty(count, np.int64)
    zero, one = numbers[0], numbers[1]  # not literals, or the sums would be in float64
    found = 0
    while True:
        held, lowest = _gather(positions, starts, cursors, tasks, entries)
        if held == 0:
            return found
        ballot = zero
        for i in range(held):
            value = values[entries[i]]
            if vote == 1:
                ballot += weights[tasks[i]] * value
            elif vote == 2:
                ballot += value
            elif vote == 3:
                ballot += np.sign(value)
        majority = 1 if ballot >= 0 else -1
        total, divisor = zero, zero
        for i in range(held):
            weight, value = weights[tasks[i]], values[entries[i]]
            side = np.sign(weight * value) if vote == 1 else np.sign(value)
            if vote == 0 or side == majority:
                total += weight * value
                divisor += one if divide == 2 else weight
        if divide == 1 and divisor != 0:
            total /= divisor
        elif divide == 2:
            total /= max(divisor, one)
        elif divide == 3:
            total /= max(divisor, tiny)
        out_positions[found] = lowest
        out_values[found] = total
        out_entries[found] = entries[0]
        found += 1


@njit(nogil=True, cache=True)
def _reduce_changed(positions, values, starts, threshold, uniques, numbers, out_positions, out_values, out_entries):
    count = starts.shape[0] - 1
    cursors, tasks, entries = starts[:-1].copy(), np.empty(count, np.int64), np.empty(count, np.int64)
    found = 0
    while True:
        held, lowest = _gather(positions, starts, cursors, tasks, entries)
        if held == 0:
            return found
        members = 0
        for i in range(held):
            members += abs(values[entries[i]]) > threshold
        total = numbers[0]
        for i in range(held):
            value = values[entries[i]]
            if abs(value) > threshold:
                total += value * uniques[tasks[i]] if members == 1 else value / numbers[members]
        out_positions[found] = lowest
        out_values[found] = total
        out_entries[found] = entries[0]
        found += members > 0


@njit(nogil=True, cache=True)
def _count(positions, values, starts, threshold, shared, unique, pairs, conflicts):
    count = starts.shape[0] - 1
    cursors, tasks, entries = starts[:-1].copy(), np.empty(count, np.int64), np.empty(count, np.int64)
    union = conflicting = 0
    while True:
        held, _ = _gather(positions, starts, cursors, tasks, entries)
        if held == 0:
            return union, conflicting
        members = ups = 0
        for i in range(held):
            if abs(values[entries[i]]) > threshold:
                tasks[members] = tasks[i]
                entries[members] = entries[i]
                ups += values[entries[i]] > 0
                members += 1
        union += members > 0
        conflicting += 0 < ups < members
        for i in range(members):
            if members == 1:
                unique[tasks[i]] += 1
            else:
                shared[tasks[i]] += 1
            for j in range(i):
                opposite = (values[entries[i]] > 0) != (values[entries[j]] > 0)
                for a, b in ((tasks[i], tasks[j]), (tasks[j], tasks[i])):
                    pairs[a, b] += 1
                    conflicts[a, b] += opposite


@njit(nogil=True, cache=True)
def _variances(positions, values, starts, out_positions, out_values):
    count = starts.shape[0] - 1
    cursors, tasks, entries = starts[:-1].copy(), np.empty(count, np.int64), np.empty(count, np.int64)
    found = 0
    while True:
        held, lowest = _gather(positions, starts, cursors, tasks, entries)
        if held == 0:
            return found
        mean = 0.0
        for i in range(held):
            mean += values[entries[i]]
        mean /= count
        variance = (count - held) * mean * mean
        for i in range(held):
            variance += (values[entries[i]] - mean) ** 2
        out_positions[found] = lowest
        out_values[found] = variance / count
        found += 1


@dataclass(frozen=True, slots=True)
class _Stack:
    """The entries of all vectors, one vector after another; those of vector ``t`` are ``starts[t]:starts[t + 1]``."""

    positions: npt.NDArray[np.signedinteger]
    values: Floats
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, vectors: Sequence[Vector]) -> _Stack:
        starts = np.cumsum([0, *(v.positions.size for v in vectors)]).astype(np.int64)
        return cls(np.concatenate([v.positions for v in vectors]), np.concatenate([v.values for v in vectors]), starts)

    def vector(
        self, vectors: Sequence[Vector], found: int, positions: npt.NDArray[np.signedinteger], values: Floats,
        entries: npt.NDArray[np.int64],
    ) -> Vector:  # fmt: skip
        cells = np.concatenate([v.cells for v in vectors])
        if 2 * found < positions.size:  # else what a copy frees is less than what it costs
            positions, values = positions[:found].copy(), values[:found].copy()
        return Vector(positions[:found], values[:found], cells[entries[:found]])


def reduce(
    vectors: Sequence[Vector], weights: Sequence[float], *, vote: Vote = "all", divide: Divide = "nothing"
) -> Vector:
    """The weighted sum of at least one vector, over the entries that agree with the vote, divided as asked.

    vote: ``all`` entries count; or those whose sign is that of the sum of weighted values (``weighted``), of plain
    values (``total``) or of signs (``frequency``), a sum of 0 being positive. divide: by nothing, by the sum of the
    counting ``weights`` (where that is not 0), by their ``count``, or by their weights, at least 1e-6. All sums run in
    the order of the vectors and in the values' precision.
    """
    return _reduced(reduce_blocks, vectors, weights, vote, divide)


def reduce_in_turn(
    vectors: Sequence[Vector], weights: Sequence[float], *, vote: Vote = "all", divide: Divide = "nothing"
) -> Vector:
    """:func:`reduce`, walking through all vectors position by position: slower, easier to read, and the same bits."""
    return _reduced(_reduce, vectors, weights, vote, divide)


def _reduced(work: Any, vectors: Sequence[Vector], weights: Sequence[float], vote: Vote, divide: Divide) -> Vector:
    stack = _Stack.of(vectors)
    size, kind = stack.positions.size, stack.values.dtype
    positions, values, entries = np.empty_like(stack.positions), np.empty_like(stack.values), np.empty(size, np.int64)
    found = work(
        stack.positions, stack.values, stack.starts, np.asarray(weights, kind), np.arange(2, dtype=kind),
        kind.type(1e-6), _VOTES[vote], _DIVIDES[divide], positions, values, entries,
    )  # fmt: skip
    return stack.vector(vectors, found, positions, values, entries)


def reduce_changed(vectors: Sequence[Vector], threshold: float, uniques: Sequence[float]) -> Vector:
    """The mean of the entries larger than ``threshold``, or, where there is one only, that one times its vector's
    ``uniques``."""
    stack = _Stack.of(vectors)
    size = stack.positions.size
    positions, values, entries = np.empty_like(stack.positions), np.empty_like(stack.values), np.empty(size, np.int64)
    kind = stack.values.dtype
    found = _reduce_changed(
        stack.positions, stack.values, stack.starts, kind.type(threshold), np.asarray(uniques, kind),
        np.arange(len(vectors) + 1, dtype=kind), positions, values, entries,
    )  # fmt: skip
    return stack.vector(vectors, found, positions, values, entries)


def count_overlap(vectors: Sequence[Vector], threshold: float = 0.0) -> Counts:
    """How the entries larger than ``threshold`` of at least one vector meet."""
    stack, count = _Stack.of(vectors), len(vectors)
    shared, unique = np.zeros(count, np.int64), np.zeros(count, np.int64)
    pairs, conflicts = np.zeros((count, count), np.int64), np.zeros((count, count), np.int64)
    union, conflicting = _count(
        stack.positions, stack.values, stack.starts, stack.values.dtype.type(threshold),
        shared, unique, pairs, conflicts,
    )  # fmt: skip
    return Counts(shared, unique, pairs, conflicts, int(union), int(conflicting))


def variances(vectors: Sequence[Vector]) -> tuple[npt.NDArray[np.signedinteger], npt.NDArray[np.float64]]:
    """The population variance over all vectors at each position that any has: positions and variances."""
    stack = _Stack.of(vectors)
    positions, values = np.empty_like(stack.positions), np.empty(stack.positions.size, np.float64)
    found = _variances(stack.positions, stack.values, stack.starts, positions, values)
    return positions[:found], values[:found]

"""Selection of the largest magnitudes on the CPU, in stripes on several threads: mostly a single pass over memory.

A lower bound of the threshold lets one pass collect few candidates that surely hold the answer. The bound comes from a
hint (the last step's threshold) or from a sample; where it proves wrong (a stale hint, crowds of equal values) a
histogram of all keys finds an exact one. The answer is the same on every way, and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from thinwire.tensors.select_bound import INFINITY, LARGEST, rank_in_sample, room_for
from thinwire.tensors.select_cpu import BINS, accumulate, collect, emit, emit_from, fill, sample, sample_sum, tally
from thinwire.wire.vector import LANES

__all__ = ["accumulate_top_k", "at_least", "fill_sparse", "top_k"]

Floats = npt.NDArray[np.float32]
Keys = npt.NDArray[np.uint32]
Indices = npt.NDArray[np.int32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Selected:
    """Sorted indices, the key of the smallest one selected, and whether all keys there were are finite."""

    indices: Indices
    key: int
    finite: bool


_STRIPE_MIN = 1 << 21  # elements for which another thread is worth its start
_SMALL = 1 << 14  # elements up to which histograms are as fast as a sample
_SAMPLE_LOG_MAX = 16
_SAMPLED = 9  # one key in so many powers of 2: more cost more cache misses than they save candidates
_SLACK = 0.9  # of a hint: a threshold that fell by up to a tenth still costs a single pass


def _aligned(out: Floats) -> bool:
    return out.ctypes.data % 64 == 0


def _key(value: float) -> int:
    with np.errstate(over="ignore"):
        return int(np.float32(value).view(np.uint32)) & LARGEST


@dataclass(slots=True)
class _Team:
    """Equal stripes of ``numel`` elements, and the threads that work on them."""

    bounds: list[tuple[int, int]]
    pool: ThreadPoolExecutor | None

    def each(self, work: Callable[[int], T]) -> list[T]:
        """``[work(0), work(1), ...]``, one call a stripe, at once."""
        stripes = range(len(self.bounds))
        return [work(s) for s in stripes] if self.pool is None else list(self.pool.map(work, stripes))

    def cut(self, array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        return [array[first:last] for first, last in self.bounds]


@contextmanager
def _team(numel: int, threads: int) -> Iterator[_Team]:
    count = max(1, min(threads, numel // _STRIPE_MIN))
    edges = [*(numel * s // count // LANES * LANES for s in range(count)), numel]
    bounds = list(pairwise(edges))
    if count == 1:
        yield _Team(bounds, None)
        return
    with ThreadPoolExecutor(count) as pool:
        yield _Team(bounds, pool)


class _Search:
    """Narrows the ``rank``-th largest of all keys of ``parts`` down from ``low <= key <= high``, by histograms.

    ``above`` counts, part by part, the keys that turned out larger, ``equal`` those between ``low`` and ``high``.
    """

    def __init__(self, team: _Team, parts: Sequence[Keys], low: int, high: int, rank: int) -> None:
        self.team, self.parts = team, parts
        self.low, self.high, self.rank = low, high, rank
        self.above = np.zeros(len(parts), np.int64)
        self.equal = np.zeros(len(parts), np.int64)
        self.finite = True

    @property
    def at_least(self) -> int:
        """Keys >= ``low``, after a step."""
        return int(self.above.sum() + self.equal.sum())

    def step(self) -> None:
        span = self.high - self.low
        shift = max(0, span.bit_length() - (BINS - 1).bit_length())
        low, wide, by = np.uint32(self.low), np.uint32(span), np.uint32(shift)

        def count(s: int) -> npt.NDArray[np.int64]:
            counts = np.zeros((4, BINS), np.uint32)
            tally(self.parts[s], low, wide, by, counts)
            total: npt.NDArray[np.int64] = counts.sum(0, dtype=np.int64)
            return total

        counts = np.stack(self.team.each(count))
        from_top = counts.sum(0)[::-1].cumsum()
        steps = int(np.searchsorted(from_top, self.rank))
        bin_ = BINS - 1 - steps
        if self.high == LARGEST:
            self.finite = not counts[:, (INFINITY - self.low) >> shift :].any()
        self.rank -= int(from_top[steps - 1]) if steps else 0
        self.above += counts[:, bin_ + 1 :].sum(1)
        self.equal = counts[:, bin_]
        self.low += bin_ << shift
        self.high = min(self.high, self.low + (1 << shift) - 1)

    def finish(self) -> None:
        while True:
            self.step()
            if self.low == self.high:
                return

    def answer(self, write: Callable[[int, np.uint32, int, Indices], object]) -> Selected:
        """``write(part, key, ties, out)`` fills ``out``; ties go to the lowest indices, that is, to the first parts."""
        before = np.concatenate(([0], self.equal.cumsum()[:-1]))
        ties = np.clip(self.rank - before, 0, self.equal)
        edges = np.concatenate(([0], (self.above + ties).cumsum()))
        out, key = np.empty(int(edges[-1]), np.int32), np.uint32(self.low)
        self.team.each(lambda s: write(s, key, int(ties[s]), out[edges[s] : edges[s + 1]]))
        return Selected(out, self.low, self.finite)


@dataclass(slots=True)
class _Candidates:
    """All keys >= ``limit`` with their indices, stripe by stripe."""

    indices: list[Indices]
    keys: list[Keys]
    limit: int

    @property
    def count(self) -> int:
        return sum(part.size for part in self.keys)

    @property
    def largest(self) -> int:
        return max((int(part.max()) for part in self.keys if part.size), default=0)

    def top_k(self, team: _Team, k: int) -> Selected:
        """The answer, if there are at least ``k``. Whatever is not finite is among the candidates."""
        largest = self.largest
        search = _Search(team, self.keys, self.limit, largest, k)
        search.finish()
        found = search.answer(lambda s, key, ties, out: emit_from(self.indices[s], self.keys[s], key, ties, out))
        return Selected(found.indices, found.key, largest < INFINITY)


Pass = Callable[[int, np.uint32, Indices, Keys], int]


def _gather(team: _Team, run: Pass, limit: int, room: int) -> _Candidates | None:
    """What one pass collects; None if that is more than ``room`` in a stripe."""

    def work(s: int) -> tuple[Indices, Keys] | None:
        first, last = team.bounds[s]
        size = min(room, last - first) + 64  # the loops want room for a whole mask
        indices, keys = np.empty(size, np.int32), np.empty(size, np.uint32)
        found = run(s, np.uint32(limit), indices, keys)
        return None if found < 0 else (indices[:found], keys[:found])

    parts = team.each(work)
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    return _Candidates([part[0] for part in whole], [part[1] for part in whole], limit)


def _sample_log(numel: int) -> int:
    return min(_SAMPLE_LOG_MAX, (numel >> _SAMPLED).bit_length() - 1)


def _bound(keys: Keys, numel: int, k: int) -> tuple[int, int]:
    """A key that almost surely at least ``k`` of all reach, of which ``keys`` are a sample; and room for those."""
    rank = rank_in_sample(k, numel, keys.size)
    if not rank:
        return 0, 0
    found = int(np.partition(keys, keys.size - rank)[keys.size - rank])
    return min(found, INFINITY), room_for(rank, numel, keys.size)


def _from_hint(hint: float | None, k: int) -> tuple[int, int]:
    if hint is None or not isfinite(hint) or not hint > 0:
        return 0, 0
    return min(_key(_SLACK * hint), INFINITY), 4 * k + 4096


def _reading(team: _Team, bits: Keys) -> Pass:
    parts = team.cut(bits)
    return lambda s, limit, indices, keys: collect(parts[s], team.bounds[s][0], limit, indices, keys)


def _by_histogram(team: _Team, bits: Keys, k: int) -> Selected:
    """Exact whatever the values: two passes, or four where a crowd of equal values lies at the threshold."""
    parts = team.cut(bits)
    search = _Search(team, parts, 0, LARGEST, k)
    search.step()
    finite = search.finite
    if search.at_least <= 2 * k + 4096 and bits.size > _SMALL:
        found = _gather(team, _reading(team, bits), min(search.low, INFINITY), search.at_least)
        if found is not None:
            return found.top_k(team, k)
    if search.low < search.high:
        search.finish()
    chosen = search.answer(lambda s, key, ties, out: emit(parts[s], team.bounds[s][0], key, ties, out))
    return Selected(chosen.indices, chosen.key, finite)


def _from_sample(team: _Team, bits: Keys, k: int) -> Selected:
    """One pass if the values are any ordinary ones."""
    if bits.size > _SMALL:
        log = _sample_log(bits.size)
        keys = np.empty(1 << log, np.uint32)
        sample(bits, log, keys)
        limit, room = _bound(keys, bits.size, k)
        found = _gather(team, _reading(team, bits), limit, room) if limit else None
        if found is not None and found.count >= k:
            return found.top_k(team, k)
    return _by_histogram(team, bits, k)


def _nothing(found: _Candidates | None) -> Selected:
    return Selected(np.empty(0, np.int32), INFINITY, found is not None and found.count == 0)


def top_k(x: Floats, k: int, *, hint: float | None, threads: int) -> Selected:
    """The ``k`` largest magnitudes of ``x``, 1-d; ``0 <= k <= x.size < 2**31``."""
    bits = x.view(np.uint32)
    with _team(x.size, threads) as team:
        if k == 0:
            return _nothing(_gather(team, _reading(team, bits), INFINITY, 0))
        limit, room = _from_hint(hint, k)
        found = _gather(team, _reading(team, bits), limit, room) if limit else None
        if found is not None and found.count >= k:
            return found.top_k(team, k)
        return _from_sample(team, bits, k)


def accumulate_top_k(
    gradient: Floats,
    residual: Floats,
    out: Floats,
    k: int,
    *,
    hint: float | None,
    scale: float,
    keep: float,
    threads: int,
) -> Selected:
    """``out = scale * gradient + keep * residual`` and :func:`top_k` of ``out``, in the same pass."""
    times, plus, bits = np.float32(scale), np.float32(keep), out.view(np.uint32)
    past_cache = _aligned(out) and out.ctypes.data not in (gradient.ctypes.data, residual.ctypes.data)
    with _team(out.size, threads) as team:
        left, right, total, words = team.cut(gradient), team.cut(residual), team.cut(out), team.cut(bits)
        limit, room = _from_hint(hint, k) if k else (0, 0)
        if not limit and k and out.size > _SMALL:
            log = _sample_log(out.size)
            sums = np.empty(1 << log, np.float32)
            sample_sum(gradient, residual, times, plus, log, sums)
            limit, room = _bound(sums.view(np.uint32) & np.uint32(LARGEST), out.size, k)

        def add(s: int, limit: np.uint32, indices: Indices, keys: Keys) -> int:
            found = accumulate(
                left[s], right[s], total[s], words[s], team.bounds[s][0], times, plus, limit, past_cache,
                indices, keys, keys.view(np.float32),
            )  # fmt: skip
            return int(found)

        found = _gather(team, add, limit or INFINITY, room)
        if k == 0:
            return _nothing(found)
        if found is not None and found.count >= k:
            return found.top_k(team, k)
        return _from_sample(team, bits, k)


def at_least(x: Floats, threshold: float, *, cap: int | None, threads: int) -> Indices:
    """Sorted indices of all magnitudes >= ``threshold``; of the ``cap`` largest, if there are more."""
    bits, limit = x.view(np.uint32), _key(threshold)
    with _team(x.size, threads) as team:
        found = _gather(team, _reading(team, bits), limit, x.size // 16 if cap is None else cap)
        if found is None and cap is None:
            found = _gather(team, _reading(team, bits), limit, x.size)
        if cap is not None and cap > 0 and (found is None or found.count > cap):
            return _from_sample(team, bits, cap).indices
    return np.concatenate(found.indices) if found is not None and cap != 0 else np.empty(0, np.int32)


def fill_sparse(out: Floats, indices: Indices, values: Floats, *, threads: int) -> bool:
    """Zero ``out`` and write ``values`` at ``indices``; False if these do not increase strictly within ``out``."""
    lead = min(out.size, -out.ctypes.data % 64 // 4)  # what lies before the first whole line of the cache
    with _team(out.size - lead, threads) as team:
        starts = [lead + first for first, _ in team.bounds]
        edges = np.searchsorted(indices, [*starts, out.size])
        parts = team.cut(out[lead:])

        def work(s: int) -> int:
            chosen = slice(edges[s], edges[s + 1])
            return int(fill(parts[s], starts[s], indices[chosen], values[chosen], _aligned(parts[s])))

        done = sum(team.each(work))
    first = slice(0, edges[0])
    return done + int(fill(out[:lead], 0, indices[first], values[first], False)) == indices.size

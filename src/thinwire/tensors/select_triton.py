"""Selection of the largest magnitudes on CUDA: two streaming passes over memory, and one wait for the device.

A small sample bounds the threshold from below. The first pass (which may also accumulate a gradient) counts what
reaches the bound, block by block, and makes a histogram of the leading 16 bits of those few; the second writes them,
in order, and counts the other 15 bits of those in the threshold's bin. That gives the exact threshold, and a last step
among the candidates keeps what is above it and the first of what is equal. Where the sample misled (a crowd of equal
values) torch's operations take over. Positions come from sums, none from atomics, so the order is always the same.

There is no use for a hint here: the sample costs two small launches. Keys are the bits of ``|x|``, as int32.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from thinwire.tensors import select_torch
from thinwire.tensors.select_bound import INFINITY, rank_in_sample, room_for

__all__ = ["accumulate_top_k", "top_k"]

_BLOCK = 4096
_SAMPLE = 1 << 14
_NUMEL_MIN = 1 << 18  # below, torch's operations are as fast
_HIGH, _LOW = 1 << 16, 1 << 15  # bins of the leading 16 bits of a key, and of the other 15
_STATE = 8
# Places in the state, which stays on the device until the end.
_LIMIT = tl.constexpr(0)  # the bound
_TOTAL = tl.constexpr(1)  # keys that reach it
_BIN = tl.constexpr(2)  # leading bits of the threshold
_RANK = tl.constexpr(3)  # of the threshold in its bin
_KEY = tl.constexpr(4)  # the threshold
_TIES = tl.constexpr(5)  # keys equal to it that are selected
_ODD = tl.constexpr(6)  # values that are not finite
_TOP = tl.constexpr(INFINITY)
_LINE = tl.constexpr(256)


@triton.jit
def _value(x, residual, i, mask, scale, keep, ACCUMULATE: tl.constexpr):
    value = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    if ACCUMULATE:  # compiled without fusing, so that the rounding is torch's
        value = scale * value + keep * tl.load(residual + i, mask=mask, other=0.0)
    return value


@triton.jit
def _key(value):
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _reach(counts, rank):
    """How many of ``counts``, summed up from the first, stay below ``rank``; and their sum."""
    sums = tl.cumsum(counts, 0)
    below = sums < rank
    return tl.sum(below.to(tl.int32), 0), tl.max(tl.where(below, sums, 0), 0)


@triton.jit
def _find(histogram, rank, BINS: tl.constexpr):
    """The ``rank``-th largest's bin (-1: there are fewer), what the bins above it hold, and what all hold."""
    lines: tl.constexpr = BINS // _LINE
    line, column = tl.arange(0, lines), tl.arange(0, _LINE)
    sums = tl.sum(tl.load(histogram + (BINS - 1) - (line[:, None] * _LINE + column[None, :])), 1)
    steps, before = _reach(sums, rank)
    place = histogram + (BINS - 1) - (steps * _LINE + column)
    inner, more = _reach(tl.load(place, mask=(column >= 0) & (steps < lines), other=0), rank - before)
    found = tl.where(steps < lines, BINS - 1 - (steps * _LINE + inner), -1)
    return found, before + more, tl.sum(sums, 0)


@triton.jit
def _sample(x, residual, n, scale, keep, histogram, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = j.to(tl.int64) * n // SIZE + ((j * 40503) & 0xFFFFFF) % (n // SIZE)
    key = _key(_value(x, residual, i, j >= 0, scale, keep, ACCUMULATE))
    tl.atomic_add(histogram + (key >> 15), (j >= 0).to(tl.int32), sem="relaxed")


@triton.jit
def _bound(state, histogram, rank, BINS: tl.constexpr):
    found, before, _ = _find(histogram, rank, BINS)
    inside = tl.load(histogram + found)
    # A crowd in one bin (zeros, constants) would be no few candidates: then collect nothing, and give up.
    crowd = (found == 0) | (before + inside > 2 * rank + 64)
    tl.store(state + _LIMIT, tl.where(crowd, _TOP, tl.minimum(found << 15, _TOP)))


@triton.jit
def _count(
    x, residual, out, n, scale, keep, state, histogram, counts, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    value = _value(x, residual, i, inside, scale, keep, ACCUMULATE)
    if ACCUMULATE:
        tl.store(out + i, value, mask=inside)
    key = _key(value)
    hot = inside & (key >= tl.load(state + _LIMIT))
    tl.store(counts + block, tl.sum(hot.to(tl.int32), 0))
    tl.atomic_add(histogram + (key >> 15), hot.to(tl.int32), mask=hot, sem="relaxed")


@triton.jit
def _pick_high(state, histogram, k, BINS: tl.constexpr):
    found, before, total = _find(histogram, k, BINS)
    odd = (_TOP >> 15) + tl.arange(0, BINS - (_TOP >> 15))
    tl.store(state + _TOTAL, total)
    tl.store(state + _BIN, found)
    tl.store(state + _RANK, k - before)
    tl.store(state + _ODD, tl.sum(tl.load(histogram + odd), 0))


@triton.jit
def _write(x, n, state, sums, counts, indices, keys, room, histogram, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    count = tl.load(counts + block)
    if count > 0:
        i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        key = _key(tl.load(x + i, mask=inside, other=0.0).to(tl.float32))
        hot = inside & (key >= tl.load(state + _LIMIT))
        at = tl.load(sums + block) - count + tl.cumsum(hot.to(tl.int32), 0) - 1
        kept = hot & (at < room)
        tl.store(indices + at, i.to(tl.int32), mask=kept)
        tl.store(keys + at, key, mask=kept)
        near = hot & ((key >> 15) == tl.load(state + _BIN))
        tl.atomic_add(histogram + (key & 0x7FFF), near.to(tl.int32), mask=near, sem="relaxed")


@triton.jit
def _pick_low(state, histogram, BINS: tl.constexpr):
    rank = tl.load(state + _RANK)
    found, before, _ = _find(histogram, rank, BINS)
    tl.store(state + _KEY, (tl.load(state + _BIN) << 15) | found)
    tl.store(state + _TIES, rank - before)


@triton.jit
def _tally(keys, room, state, above, equal, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    j = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + j, mask=j < tl.minimum(room, tl.load(state + _TOTAL)), other=-1)
    threshold = tl.load(state + _KEY)
    tl.store(above + block, tl.sum((key > threshold).to(tl.int32), 0))
    tl.store(equal + block, tl.sum((key == threshold).to(tl.int32), 0))


@triton.jit
def _finish(indices, keys, room, state, above, equal, above_sums, equal_sums, out, k, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    j = block * BLOCK + tl.arange(0, BLOCK)
    inside = j < tl.minimum(room, tl.load(state + _TOTAL))
    key = tl.load(keys + j, mask=inside, other=-1)
    threshold, ties = tl.load(state + _KEY), tl.load(state + _TIES)
    larger, same = (key > threshold).to(tl.int32), (key == threshold).to(tl.int32)
    before = tl.load(above_sums + block) - tl.load(above + block) + tl.cumsum(larger, 0) - larger
    tie = tl.load(equal_sums + block) - tl.load(equal + block) + tl.cumsum(same, 0) - same
    at = before + tl.minimum(tie, ties)
    taken = inside & ((larger > 0) | ((same > 0) & (tie < ties))) & (at < k)
    tl.store(out + at, tl.load(indices + j, mask=taken, other=0), mask=taken)


def _sums(counts: torch.Tensor) -> torch.Tensor:
    return torch.cumsum(counts, -1, dtype=torch.int32)


def _run(
    x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor, scale: float, keep: float, k: int, *, accumulate: bool
) -> select_torch.Found | None:
    """The answer, or None where the sample misled; ``out`` is complete in any case."""
    n, device = x.numel(), x.device
    rank = rank_in_sample(k, n, _SAMPLE)
    room = min(n, room_for(rank, n, _SAMPLE) * 17 // 16)  # the bound is rounded down to its bin
    blocks, few = triton.cdiv(n, _BLOCK), triton.cdiv(room, _BLOCK)
    work = torch.zeros(_STATE + 2 * _HIGH + _LOW, dtype=torch.int32, device=device)
    state, sampled, high, low = work.split([_STATE, _HIGH, _HIGH, _LOW])
    counts = torch.empty(blocks, dtype=torch.int32, device=device)
    indices, keys = torch.empty(2, room, dtype=torch.int32, device=device)
    tallies = torch.empty(2, few, dtype=torch.int32, device=device)
    selected = torch.empty(k, dtype=torch.int32, device=device)
    exact: dict[str, Any] = {"ACCUMULATE": accumulate, "BLOCK": _BLOCK, "enable_fp_fusion": False}
    _sample[(_SAMPLE // _BLOCK,)](x, residual, n, scale, keep, sampled, SIZE=_SAMPLE, **exact)
    _bound[(1,)](state, sampled, rank, BINS=_HIGH, num_warps=16)
    _count[(blocks,)](x, residual, out, n, scale, keep, state, high, counts, num_warps=8, **exact)
    sums = _sums(counts)
    _pick_high[(1,)](state, high, k, BINS=_HIGH, num_warps=16)
    _write[(blocks,)](out, n, state, sums, counts, indices, keys, room, low, BLOCK=_BLOCK, num_warps=8)
    _pick_low[(1,)](state, low, BINS=_LOW, num_warps=16)
    _tally[(few,)](keys, room, state, tallies[0], tallies[1], BLOCK=_BLOCK, num_warps=8)
    totals = _sums(tallies)
    _finish[(few,)](
        indices, keys, room, state, tallies[0], tallies[1], totals[0], totals[1], selected, k, BLOCK=_BLOCK, num_warps=8
    )
    _, total, _, _, key, _, odd, _ = state.tolist()  # the one wait
    return (selected, key, odd == 0) if k <= total <= room else None


def _worth(k: int, n: int) -> bool:
    return n >= _NUMEL_MIN and k > 0 and rank_in_sample(k, n, _SAMPLE) > 0


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def top_k(x: torch.Tensor, k: int) -> select_torch.Found:
    """The ``k`` largest magnitudes of a 1-d contiguous tensor of float32, bfloat16 or float16."""
    found = None
    if _worth(k, x.numel()):
        with _on(x.device):
            found = _run(x, x, x, 1.0, 1.0, k, accumulate=False)
    return select_torch.top_k(x, k) if found is None else found


def accumulate_top_k(
    gradient: torch.Tensor, residual: torch.Tensor, out: torch.Tensor, k: int, scale: float, keep: float
) -> select_torch.Found:
    """``out = scale * gradient + keep * residual`` and :func:`top_k` of it, the sum in the first pass."""
    found = None
    if _worth(k, out.numel()):
        with _on(out.device):
            found = _run(gradient, residual, out, scale, keep, k, accumulate=True)
    else:
        select_torch.accumulate(gradient, residual, out, scale, keep)
    return select_torch.top_k(out, k) if found is None else found

"""The mean of everybody's selected elements, at a cost that does not grow with the number of workers.

Three ways to reduce a sparse update, three for a dense one. ``n`` elements, ``k`` selected, ``P`` ranks, ``b``
bytes an entry (index and value); received bytes per rank:

==================  =================  ============================================================================
way                 received           how
==================  =================  ============================================================================
:func:`split`       2 k b (P-1)/P      every region of the update has an owner, who sums what all selected in it; the
                                       largest k sums go back to everybody (Li & Hoefler 2022, Ok-Topk)
:func:`gather`      k b (P-1)          everybody sends everything to everybody; fewest rounds, for 2 or 3 ranks
:func:`shared`      2 k v (P-1)/P      all use one rank's positions, then reduce k values of v bytes (rotating leader),
                                       or positions that all know already
:func:`dense`       2 n v (P-1)/P      all values, quantised, reduced by region owners who quantise again
:func:`low_rank`    2 factors          factors of matrices, all-reduced as they stand (Vogels et al. 2019, PowerSGD)
:func:`plain`       8 n (P-1)/P        the backend's all-reduce of float32: what all others are measured against
==================  =================  ============================================================================

Nothing is lost on the way. What a rank selected but the owners did not keep, and what rounding took from its values,
is not credited, so it stays in that rank's residual; what rounding took from an owner's sums is charged to the owner.
Law, over all ranks: ``sum of applied + mean of residuals == sum of true means``.

Every function is collective and returns None where some rank's update is not finite: then no rank has changed anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from thinwire.compress.base import State
from thinwire.compress.group import Group, sizes_of
from thinwire.compress.lowrank import LowRank
from thinwire.compress.sparsify import Sparsifier, all_finite, block_norms, expand_runs
from thinwire.compress.values import ValueCodec
from thinwire.errors import MalformedError
from thinwire.tensors.select import top_k

__all__ = ["Carry", "Credit", "Reduced", "dense", "gather", "low_rank", "merge", "plain", "shared", "split"]

BINS = 64
_COARSE, _FINE = 25, 20  # bits dropped from a float's 31: bins of two powers of 4, and of an eighth of a power of 2


@final
@dataclass(frozen=True)
class Credit:
    """What leaves this rank's residual: ``values`` float32 at ``positions`` int32 (None: everywhere, in order)."""

    positions: Tensor | None
    values: Tensor


@final
@dataclass(frozen=True)
class Reduced:
    """The mean over ranks, the same bits on each: ``values`` at ``positions`` (None: all of them)."""

    positions: Tensor | None
    values: Tensor
    credits: tuple[Credit, ...]


@final
@dataclass(frozen=True)
class Carry:
    """What ranks agree on from one step to the next without a message: it follows from what all have received.

    ``edges`` are the P + 1 borders of the owners' regions, so placed that each held as many of the last sums;
    ``threshold`` is the leading bits of the smallest sum kept; ``step`` varies stochastic rounding.
    """

    edges: tuple[int, ...] | None = None
    threshold: int | None = None
    step: int = 0


def split(
    values: Tensor,
    positions: Tensor,
    numel: int,
    *,
    finite: bool,
    compressor: Sparsifier,
    group: Group,
    carry: Carry,
    keep: int,
    importance: Tensor | None = None,
    offsets: Sequence[int] = (0,),
) -> tuple[Reduced | None, Carry]:
    """Split-and-reduce with balanced regions and global re-selection.

    Args:
        values: what this rank selected, float32 ``[k]``.
        positions: where, int32 ``[k]`` increasing, below ``numel``.
        finite: whether this rank's update is; if any rank's is not, the result is None.
        keep: how many sums are kept over all regions.
        importance: float32 ``[parameters]``, factors by which the magnitudes in the parameters that start at
            ``offsets`` are multiplied before they compete, where each parameter has a budget of its own.
    """
    rank, size, n, codec = group.rank, group.size, numel, compressor.codec
    edges = carry.edges if carry.edges and len(carry.edges) == size + 1 else uniform_edges(n, size, compressor.run)
    seed = _seed(carry, rank)

    # 1. To every owner, what this rank selected in its region.
    borders = torch.tensor(edges, dtype=torch.int32, device=positions.device)
    cuts = torch.searchsorted(positions, borders).tolist() if finite else [0] * (size + 1)
    outgoing, sent = [], []
    for r in range(size):
        inside = slice(cuts[r], cuts[r + 1])
        data = codec.encode(values[inside], seed)
        outgoing.append(torch.cat([compressor.pack(positions[inside] - edges[r], edges[r + 1] - edges[r]), data]))
        sent.append(codec.decode(data, cuts[r + 1] - cuts[r]))
    counts = _swap_counts(group, [cuts[r + 1] - cuts[r] if finite else -1 for r in range(size)])
    if min(counts) < 0:
        return None, carry
    length = edges[rank + 1] - edges[rank]
    slices = _receive(group, compressor, outgoing, counts, [length] * size)

    # 2. The owner's means, and which of them are kept.
    mine, means = merge(slices, length)
    means /= size
    scores = _scores(means, mine + edges[rank], importance, offsets)
    quotas, threshold = _agree_on_quotas(group, scores, keep, carry.threshold)
    kept = _largest(mine, scores, quotas[rank], compressor.run, length)
    mine, means = mine[kept], means[kept]

    # 3. From every owner, what it kept.
    data = codec.encode(means, seed + 1)
    final = codec.decode(data, mine.numel())
    counts = sizes_of(group, mine.numel()) if compressor.run > 1 else quotas
    lengths = [edges[r + 1] - edges[r] for r in range(size)]
    message = torch.cat([compressor.pack(mine, length), data])
    parts = group.all_gather(message, _message_sizes(compressor, counts, lengths))
    owned = [_parse(compressor, part, counts[r], lengths[r]) for r, part in enumerate(parts)]
    where = torch.cat([p + edges[r] for r, (p, _) in enumerate(owned)])
    reduced = Reduced(
        where,
        torch.cat([v for _, v in owned]),
        (
            _credit_of_kept(positions, torch.cat(sent), where),
            Credit(mine + edges[rank], (final - means) * size),
        ),
    )
    return reduced, Carry(_balanced_edges(where, n, size, compressor.run), threshold, carry.step + 1)


def gather(
    values: Tensor,
    positions: Tensor,
    numel: int,
    *,
    finite: bool,
    compressor: Sparsifier,
    group: Group,
    carry: Carry,
) -> tuple[Reduced | None, Carry]:
    """All-gather of everybody's packets; nothing is re-selected. Arguments as of :func:`split`."""
    n, codec = numel, compressor.codec
    counts = sizes_of(group, positions.numel() if finite else -1)
    if min(counts) < 0:
        return None, carry
    _check_counts(counts, [n] * group.size)
    data = codec.encode(values, _seed(carry, group.rank))
    message = torch.cat([compressor.pack(positions, n), data])
    parts = group.all_gather(message, _message_sizes(compressor, counts, [n] * group.size))
    where, sums = merge([_parse(compressor, part, counts[r], n) for r, part in enumerate(parts)], n)
    credit = Credit(positions, codec.decode(data, positions.numel()))
    return Reduced(where, sums / group.size, (credit,)), replace(carry, step=carry.step + 1)


def shared(
    values_at: Callable[[Tensor], Tensor],
    positions: Tensor | None,
    numel: int,
    *,
    finite: bool,
    compressor: Sparsifier,
    group: Group,
    carry: Carry,
    leader: int | None,
) -> tuple[Reduced | None, Carry]:
    """One set of positions for all, then a reduction of the values alone.

    ``values_at`` gives this rank's values, float32 ``[k]``, at positions that it may not have chosen. ``positions`` is
    needed of the rank ``leader``; without a leader (None) all ranks pass the same ones, and none travel.
    """
    n, mine = numel, positions.numel() if positions is not None else 0
    counts = sizes_of(group, mine if finite else -1)
    if min(counts) < 0:
        return None, carry
    _check_counts(counts, [n] * group.size)
    if leader is not None:
        count = counts[leader]
        data = compressor.pack(positions, n) if group.rank == leader and positions is not None else None
        # The values' device, which a rank that chose nothing knows by asking for none.
        device = values_at(torch.empty(0, dtype=torch.int32)).device if positions is None else positions.device
        data = _broadcast(group, data, leader, compressor.packed_size(count, n), device)
        positions = compressor.unpack(data, count, n)
    assert positions is not None, "whoever knows the positions passes them"
    mean, credits = _reduce_values(values_at(positions), compressor.codec, group, _seed(carry, group.rank))
    moved = tuple(Credit(positions if c.positions is None else positions[c.positions], c.values) for c in credits)
    return Reduced(positions, mean, moved), replace(carry, step=carry.step + 1)


def dense(
    compensated: Tensor, *, finite: bool, codec: ValueCodec, group: Group, carry: Carry
) -> tuple[Reduced | None, Carry]:
    """All values through ``codec``: to the owner of their region, summed, and back through it once more."""
    if min(sizes_of(group, 0 if finite else -1)) < 0:
        return None, carry
    mean, credits = _reduce_values(compensated, codec, group, _seed(carry, group.rank))
    return Reduced(None, mean, credits), replace(carry, step=carry.step + 1)


def low_rank(
    compensated: Tensor, *, finite: bool, compressor: LowRank, group: Group, state: State
) -> tuple[Reduced | None, State]:
    """PowerSGD's two all-reduces of factors. The residual is local: what this rank's own factors leave over."""
    if min(sizes_of(group, 0 if finite else -1)) < 0:
        return None, state
    projected = compressor.project(compensated, state)
    stack = projected.clone()
    _mean_(stack, group)
    stack = compressor.orthogonalise(stack, state)
    own_q = compressor.back_project(compensated, stack, state)
    own = compressor.reconstruct(compressor.with_dense_of(projected, stack, state), own_q, state)
    q = own_q.clone()
    _mean_(q, group)
    mean = compressor.reconstruct(stack, q, state)
    return Reduced(None, mean, (Credit(None, own),)), compressor.advance(q, state)


def plain(compensated: Tensor, group: Group) -> Reduced | None:
    """The backend's own all-reduce: everything is sent, nothing stays."""
    mean = compensated.clone()
    _mean_(mean, group)
    return Reduced(None, mean, (Credit(None, compensated),)) if all_finite(mean) else None


def _mean_(values: Tensor, group: Group) -> None:
    group.all_reduce_(values)
    values /= group.size


# --- regions -------------------------------------------------------------------------------------------------------


def uniform_edges(n: int, size: int, run: int) -> tuple[int, ...]:
    return (*(min(n, -(-(n * r // size) // run) * run) for r in range(size)), n)


def _balanced_edges(where: Tensor, n: int, size: int, run: int) -> tuple[int, ...] | None:
    if where.numel() < size:
        return None
    ranks = torch.arange(1, size, device=where.device) * where.numel() // size
    inner = (where[ranks] // run * run).tolist()
    return (0, *inner, n)


# --- re-selection --------------------------------------------------------------------------------------------------


def _scores(means: Tensor, where: Tensor, importance: Tensor | None, offsets: Sequence[int]) -> Tensor:
    scores = means.abs()
    if importance is None:
        return scores
    starts = torch.tensor(offsets, dtype=torch.int32, device=where.device)
    return scores * importance[torch.searchsorted(starts, where, right=True) - 1]


def _agree_on_quotas(group: Group, scores: Tensor, keep: int, threshold: int | None) -> tuple[list[int], int]:
    """How many sums each owner keeps so that together they are the ``keep`` largest, and where the border lies.

    Owners exchange histograms of 64 bins around the last border (256 bytes each) and all come to the same answer; in
    the bin that holds the border, owners keep in proportion. Exact but for the order within that one bin, whose width
    is an eighth of a power of two.
    """
    drop = _COARSE if threshold is None else _FINE
    base = 0 if threshold is None else max(0, (threshold >> _FINE) - BINS // 2)
    bins = ((scores.view(torch.int32) >> drop) - base).clamp_(0, BINS - 1)
    counts = torch.bincount(bins, minlength=BINS).to(torch.int32).cpu()
    parts = group.all_gather(counts.view(torch.uint8), [4 * BINS] * group.size)
    table = torch.stack([part.cpu().clone().view(torch.int32) for part in parts]).long()
    if int(table.min()) < 0:
        raise MalformedError("a rank counted less than nothing in its histogram")
    above = table.sum(0).flip(0).cumsum(0).flip(0)  # [b]: sums in bin b and above
    if int(above[0]) <= keep:
        return table.sum(1).tolist(), base << drop
    border = int((above >= keep).nonzero().max())
    surely = table[:, border + 1 :].sum(1)
    left = keep - int(surely.sum())
    inside = table[:, border]
    share = inside * left // int(inside.sum())
    for r in (inside * left % int(inside.sum())).argsort(descending=True, stable=True)[: left - int(share.sum())]:
        share[r] += 1
    return (surely + share).tolist(), (base + border) << drop


def _largest(positions: Tensor, scores: Tensor, quota: int, run: int, length: int) -> Tensor:
    """Indices of the ``quota`` largest scores, in order; whole runs where elements travel in runs."""
    if run == 1:
        return top_k(scores, min(quota, scores.numel())).indices
    spread = torch.zeros(length, device=scores.device)
    spread[positions] = scores
    norms = block_norms(spread, run)
    best = expand_runs(top_k(norms, min(norms.numel(), -(-quota // run))).indices, run, length)
    return torch.isin(positions, best).nonzero().view(-1)


# --- messages ------------------------------------------------------------------------------------------------------


def _seed(carry: Carry, rank: int) -> int:
    return (rank << 32) ^ (2 * carry.step)


def _swap_counts(group: Group, counts: Sequence[int]) -> list[int]:
    outgoing = [torch.tensor([count], dtype=torch.int64).view(torch.uint8) for count in counts]
    return [int(part.cpu().clone().view(torch.int64)) for part in group.all_to_all(outgoing, [8] * group.size)]


def _check_counts(counts: Sequence[int], lengths: Sequence[int]) -> None:
    for r, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if not 0 <= count <= length:
            raise MalformedError(f"rank {r} announces {count} elements of {length}", rank=r, count=count)


def _message_sizes(compressor: Sparsifier, counts: Sequence[int], lengths: Sequence[int]) -> list[int]:
    _check_counts(counts, lengths)
    codec = compressor.codec
    return [compressor.packed_size(c, n) + codec.size(c) for c, n in zip(counts, lengths, strict=True)]


def _parse(compressor: Sparsifier, message: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    where = compressor.packed_size(count, length)
    return compressor.unpack(message[:where], count, length), compressor.codec.decode(message[where:], count)


def _receive(
    group: Group, compressor: Sparsifier, outgoing: Sequence[Tensor], counts: Sequence[int], lengths: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    parts = group.all_to_all(outgoing, _message_sizes(compressor, counts, lengths))
    return [_parse(compressor, part, counts[r], lengths[r]) for r, part in enumerate(parts)]


def _broadcast(group: Group, data: Tensor | None, root: int, nbytes: int, device: torch.device) -> Tensor:
    """Scatter, then all-gather: the root sends its bytes once, not once to every rank."""
    chunk = -(-nbytes // group.size)
    sizes = [max(0, min(chunk, nbytes - r * chunk)) for r in range(group.size)]
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    outgoing = [empty] * group.size if data is None else list(torch.split(data, sizes))
    parts = group.all_to_all(outgoing, [sizes[group.rank] if r == root else 0 for r in range(group.size)])
    return torch.cat(group.all_gather(parts[root], sizes))


def _reduce_values(values: Tensor, codec: ValueCodec, group: Group, seed: int) -> tuple[Tensor, tuple[Credit, ...]]:
    """Mean of equally placed values: a reduce-scatter and an all-gather of encoded chunks. Credits' positions are
    indices into ``values``."""
    count, size, rank = values.numel(), group.size, group.rank
    sizes = [count * (r + 1) // size - count * r // size for r in range(size)]
    outgoing = [codec.encode(chunk, seed) for chunk in torch.split(values, sizes)]
    sent = torch.cat([codec.decode(data, sizes[r]) for r, data in enumerate(outgoing)])
    parts = group.all_to_all(outgoing, [codec.size(sizes[rank])] * size)
    mean = torch.zeros(sizes[rank], device=values.device)
    for part in parts:
        mean += codec.decode(part, sizes[rank])
    mean /= size
    data = codec.encode(mean, seed + 1)
    final = codec.decode(data, sizes[rank])
    start = count * rank // size
    where = torch.arange(start, start + sizes[rank], dtype=torch.int32, device=values.device)
    parts = group.all_gather(data, [codec.size(c) for c in sizes])
    whole = torch.cat([codec.decode(part, sizes[r]) for r, part in enumerate(parts)])
    return whole, (Credit(None, sent), Credit(where, (final - mean) * size))


# --- sums and credits ----------------------------------------------------------------------------------------------


def merge(slices: Sequence[tuple[Tensor, Tensor]], length: int) -> tuple[Tensor, Tensor]:
    """Sums sparse slices of ``length`` elements in their order: positions int32 increasing, sums float32.

    The order of the slices fixes the order of the additions, so that every rank that merges them gets the same bits.
    """
    if slices[0][0].device.type == "cpu":
        from thinwire.compress import loops

        positions, sums = loops.merge([(p.numpy(), v.numpy()) for p, v in slices], length)
        return torch.from_numpy(positions), torch.from_numpy(sums)
    return merge_oracle(slices, length)


def merge_oracle(slices: Sequence[tuple[Tensor, Tensor]], length: int) -> tuple[Tensor, Tensor]:
    """:func:`merge`, said in torch operations; it serves on GPUs."""
    device = slices[0][0].device
    sums = torch.zeros(length, device=device)
    touched = torch.zeros(length, dtype=torch.bool, device=device)
    for positions, values in slices:
        sums[positions] += values
        touched[positions] = True
    union = touched.nonzero().view(-1)
    return union.to(torch.int32), sums[union]


def _credit_of_kept(positions: Tensor, sent: Tensor, kept: Tensor) -> Credit:
    """What was sent counts only where it was kept."""
    if positions.device.type == "cpu":
        from thinwire.compress import loops

        member = torch.empty(positions.numel(), dtype=torch.bool)
        loops.intersect(positions.numpy(), kept.numpy(), member.numpy())
    else:
        member = torch.isin(positions, kept, assume_unique=True)
    return Credit(positions, sent * member)

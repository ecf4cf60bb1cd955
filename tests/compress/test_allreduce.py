"""The all-reduces: nothing is lost, all ranks agree, the owners keep the largest, and the bytes are as promised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.compress.ranks import together
from thinwire.compress import BlockTopK, Int8, LowRank, RandomK, Sign, Threshold, TopK
from thinwire.compress.allreduce import (
    Carry,
    Reduced,
    dense,
    gather,
    low_rank,
    merge,
    merge_oracle,
    plain,
    shared,
    split,
)
from thinwire.compress.base import Layout
from thinwire.compress.group import Group, MemoryGroup
from thinwire.compress.indices import pack, packed_size
from thinwire.compress.sparsify import Sparsifier
from thinwire.errors import MalformedError

Way = Callable[[Tensor, Group, Carry, dict], tuple[Reduced | None, Carry]]


def sparse(function: Callable, compressor: Sparsifier) -> Way:
    def reduce(compensated: Tensor, group: Group, carry: Carry, state: dict) -> tuple[Reduced | None, Carry]:
        if not state:
            state.update(compressor.init(Layout(((compensated.numel(),),))))
        positions, after = compressor.select(compensated, dict(state))
        finite = compressor.finite(compensated, positions)
        extra = {"keep": compressor.count(compensated.numel())} if function is split else {}
        values = compensated.index_select(0, positions)
        if function is shared:
            leader = None if compressor.synchronised else carry.step % group.size
            values, extra = lambda where: compensated[where.long()], {"leader": leader}
            positions = positions if leader in (None, group.rank) else None
        reduced, carry = function(
            values, positions, compensated.numel(),
            finite=finite, compressor=compressor, group=group, carry=carry, **extra,
        )  # fmt: skip
        if reduced is not None:
            state.update(after)
        return reduced, carry

    return reduce


def quantised(codec: object) -> Way:
    return lambda x, group, carry, state: dense(
        x, finite=bool(x.isfinite().all()), codec=codec, group=group, carry=carry
    )


def of_rank(rank: int) -> Way:
    compressor = LowRank(rank)

    def reduce(x: Tensor, group: Group, carry: Carry, state: dict) -> tuple[Reduced | None, Carry]:
        if not state:
            state.update(compressor.init(Layout(((x.numel() // 16, 16), (x.numel() % 16,)))))
        reduced, after = low_rank(x, finite=bool(x.isfinite().all()), compressor=compressor, group=group, state=state)
        state.update(after)
        return reduced, carry

    return reduce


WAYS: dict[str, Way] = {
    "split": sparse(split, TopK(0.05)),
    "split bf16": sparse(split, TopK(0.05, "bfloat16")),
    "split int8": sparse(split, TopK(0.05, "int8")),
    "split blocks": sparse(split, BlockTopK(0.05, "bfloat16", block=8)),
    "split threshold": sparse(split, Threshold(0.05, every=4)),
    "gather": sparse(gather, TopK(0.05)),
    "gather int8": sparse(gather, TopK(0.05, "int8")),
    "gather blocks": sparse(gather, BlockTopK(0.05, block=8)),
    "shared": sparse(shared, TopK(0.05)),
    "shared bf16": sparse(shared, TopK(0.05, "bfloat16")),
    "shared random": sparse(shared, RandomK(0.05, "int8")),
    "quantised": quantised(Int8()),
    "signs": quantised(Sign()),
    "low rank": of_rank(2),
    "plain": lambda x, group, carry, state: (plain(x, group), carry),
}


@dataclass
class Run:
    applied: list[Tensor]  # the mean of each step, dense
    residuals: list[Tensor]
    true: Tensor  # the sum of the true means, float64
    bytes_received: list[int]


def updates_of(rank: int, step: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(n, generator=generator) ** 3 * (1 + rank)


def run(way: Way, size: int, n: int, steps: int) -> Run:
    def work(group: MemoryGroup) -> tuple[list[Tensor], Tensor, int, list[str]]:
        residual, carry, state, applied, carries = torch.zeros(n), Carry(), {}, [], []
        for step in range(steps):
            residual += updates_of(group.rank, step, n)
            reduced, carry = way(residual, group, carry, state)
            assert reduced is not None
            mean = torch.zeros(n)
            if reduced.positions is None:
                mean.copy_(reduced.values)
            else:
                mean[reduced.positions] = reduced.values
            applied.append(mean)
            carries.append(repr(carry))
            for credit in reduced.credits:
                if credit.positions is None:
                    residual -= credit.values.clone()
                else:
                    residual[credit.positions] -= credit.values
        return applied, residual, group.received_bytes, carries

    results = together(size, work)
    for applied, _, _, carries in results:
        assert all(torch.equal(a, b) for a, b in zip(applied, results[0][0], strict=True)), (
            "all ranks get the same bits"
        )
        assert carries == results[0][3], "what is carried over is agreed upon"
    true = sum(updates_of(r, s, n).double() for r in range(size) for s in range(steps)) / size
    return Run(results[0][0], [r[1] for r in results], true, [r[2] for r in results])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", WAYS)
def test_what_was_applied_and_what_waits_make_up_everything(name: str, size: int) -> None:
    done = run(WAYS[name], size, 1003, steps=6)
    have = sum(a.double() for a in done.applied) + sum(r.double() for r in done.residuals) / size
    scale = done.true.abs().max()
    assert float((have - done.true).abs().max()) <= 2e-6 * float(scale)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["split", "split int8", "gather", "shared bf16", "split blocks"]),
    size=st.integers(1, 5),
    n=st.integers(1, 300),
)
def test_any_size_of_update_and_group_works(name: str, size: int, n: int) -> None:
    done = run(WAYS[name], size, n, steps=3)
    have = sum(a.double() for a in done.applied) + sum(r.double() for r in done.residuals) / size
    torch.testing.assert_close(have, done.true, rtol=1e-5, atol=1e-4)


def readable_split(updates: list[Tensor], density: float, keep: int) -> Tensor:
    """The first step of split over dense tensors: every rank's top k, their mean, its largest ``keep``."""
    total = torch.zeros_like(updates[0])
    for x in updates:
        chosen = x.abs().sort(descending=True, stable=True).indices[: max(1, round(density * x.numel()))]
        total[chosen] += x[chosen]
    mean = total / len(updates)
    kept = mean.abs().sort(descending=True, stable=True).indices[:keep]
    return torch.zeros_like(mean).index_copy(0, kept, mean[kept])


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_split_keeps_the_largest_sums_of_all(size: int) -> None:
    n = 4000
    done = run(WAYS["split"], size, n, steps=1)
    expected = readable_split([updates_of(r, 0, n) for r in range(size)], 0.05, keep=200)
    got = done.applied[0]
    assert int((got != 0).sum()) == int((expected != 0).sum())
    # Within the bin of the border the owners keep in proportion, so that a few entries beside it may differ.
    same = (got != 0) & (expected != 0)
    assert int(same.sum()) >= (200 if size == 1 else 150)
    assert torch.equal(got[same], expected[same])
    border = float(expected[expected != 0].abs().min())
    assert float(got[got != 0].abs().min()) >= border / 4  # the first step's bins are two powers of 4 wide


def test_later_steps_know_the_border_to_an_eighth_of_a_power_of_two() -> None:
    n, size = 4000, 4
    compressor = TopK(0.05)

    def work(group: MemoryGroup) -> list[Tensor]:
        carry, state, got = Carry(), compressor.init(Layout(((n,),))), []
        for step in range(3):
            x = updates_of(group.rank, step, n)
            positions, state = compressor.select(x, state)
            reduced, carry = split(
                x[positions], positions, n, finite=True, compressor=compressor, group=group, carry=carry, keep=200
            )
            assert reduced is not None
            got.append(reduced.values.abs())
        return got

    for step, values in enumerate(together(size, work)[0]):
        expected = readable_split([updates_of(r, step, n) for r in range(size)], 0.05, keep=200)
        border = float(expected[expected != 0].abs().min())
        assert values.numel() == 200
        if step:
            assert float(values.min()) >= border / 2**0.25


@pytest.mark.parametrize("name", ["split", "split bf16", "gather", "shared", "quantised", "plain"])
def test_one_bad_gradient_changes_nothing_anywhere(name: str) -> None:
    def work(group: MemoryGroup) -> tuple[bool, bool]:
        x = updates_of(group.rank, 0, 500)
        if group.rank == 1:
            x[17] = float("nan")
        reduced, carry = WAYS[name](x, group, Carry(), {})
        return reduced is None, carry == Carry()

    assert together(3, work) == [(True, True)] * 3


@pytest.mark.parametrize(
    ("name", "size", "share"),
    [("split", 2, 0.030), ("split", 8, 0.030), ("split", 16, 0.030), ("split bf16", 8, 0.009), ("shared", 2, 0.017),
     ("shared", 8, 0.017), ("shared bf16", 8, 0.009)],
)  # fmt: skip
def test_bytes_received_do_not_grow_with_the_ranks(name: str, size: int, share: float) -> None:
    compressor = TopK(0.01, "bfloat16" if "bf16" in name else "float32")
    n = 400_000
    done = run(sparse(split if "split" in name else shared, compressor), size, n, steps=2)
    dense_bytes = 2 * 2 * (size - 1) / size * 4 * n
    assert max(done.bytes_received) <= share * dense_bytes


@st.composite
def slices(draw: st.DrawFn) -> tuple[list[tuple[Tensor, Tensor]], int]:
    length = draw(st.integers(1, 400))
    parts = []
    for _ in range(draw(st.integers(1, 5))):
        chosen = sorted(draw(st.sets(st.integers(0, length - 1), max_size=60)))
        values = draw(st.lists(st.floats(width=32, allow_nan=False), min_size=len(chosen), max_size=len(chosen)))
        parts.append((torch.tensor(chosen, dtype=torch.int32), torch.tensor(values, dtype=torch.float32)))
    return parts, length


@given(slices())
def test_merging_equals_its_readable_version_bit_for_bit(case: tuple[list[tuple[Tensor, Tensor]], int]) -> None:
    parts, length = case
    for got, expected in zip(merge(parts, length), merge_oracle(parts, length), strict=True):
        assert got.dtype == expected.dtype
        assert got.numpy().tobytes() == expected.numpy().tobytes() or torch.equal(got.isnan(), expected.isnan())


class Liar:
    """A rank whose messages claim something else than they hold; the others are honest."""

    def __init__(self, group: MemoryGroup, lie: Callable[[list[Tensor]], list[Tensor]], call: int) -> None:
        self._group, self._lie, self._call = group, lie, call

    def __getattr__(self, name: str) -> object:
        return getattr(self._group, name)

    def all_to_all(self, outgoing: list[Tensor], incoming: list[int]) -> list[Tensor]:
        self._call -= 1
        return self._group.all_to_all(self._lie(outgoing) if self._call == 0 else outgoing, incoming)


def too_many(outgoing: list[Tensor]) -> list[Tensor]:
    return [torch.tensor([10**12]).view(torch.uint8) for _ in outgoing]


def unsorted(outgoing: list[Tensor]) -> list[Tensor]:
    return [torch.full_like(part, 255) for part in outgoing]


@pytest.mark.parametrize(("lie", "call"), [(too_many, 1), (unsorted, 2)])
def test_a_rank_that_lies_is_refused_before_anything_is_written(lie: Callable, call: int) -> None:
    compressor = TopK(0.05)

    def work(group: MemoryGroup) -> str:
        x = updates_of(group.rank, 0, 1000)
        positions, _ = compressor.select(x, compressor.init(Layout(((1000,),))))
        joined = Liar(group, lie, call) if group.rank == 1 else group
        before = x.clone()
        try:
            split(
                x[positions], positions, 1000, finite=True, compressor=compressor, group=joined, carry=Carry(), keep=50
            )
        except MalformedError as error:
            assert torch.equal(x, before)
            return str(error)
        except Exception as error:  # the liar itself, left alone by the others
            return type(error).__name__
        return "accepted"

    said = together(2, work, timeout_s=3.0)
    assert "1000000000000" in said[0] or "positions" in said[0], said


def test_the_packed_form_is_what_the_module_promises() -> None:
    positions = torch.arange(0, 100_000, 100, dtype=torch.int32)
    assert pack(positions, 100_000).numel() == packed_size(1000, 100_000) < 1.1 * 1000

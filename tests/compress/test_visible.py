"""What VisibleTopK sends is what a bf16 forward pass would see, and the rest waits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.compress.ranks import together
from thinwire.compress.allreduce import Carry, gather, split
from thinwire.compress.base import Compressor, Layout, Packet, State
from thinwire.compress.feedback import ErrorFeedback
from thinwire.compress.group import MemoryGroup
from thinwire.compress.visible import VisibleTopK, visible
from thinwire.errors import MisuseError
from thinwire.testing.compressors import CompressorContract


def weights(numel: int) -> Tensor:
    """Of all sizes that weights have, with zeros of both signs among them."""
    generator = torch.Generator().manual_seed(numel)
    values = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-6, 1, (numel,), generator=generator)
    values[::17], values[5::17] = 0.0, -0.0
    return values


@dataclass(frozen=True)
class AtWeights(Compressor):
    """A VisibleTopK whose owner supplies the weights, as the contract's caller does not."""

    inner: VisibleTopK

    def init(self, layout: Layout, device: torch.device | str = "cpu") -> State:
        return self.inner.init(layout, device) | {"reference": weights(layout.numel)}

    def encode(self, update: Tensor, state: State) -> tuple[Packet, State]:
        return self.inner.encode(update, state)

    def decode(self, packet: Packet) -> Tensor:
        return self.inner.decode(packet)

    def at(self, density: float) -> Compressor:
        return AtWeights(self.inner.at(density))


class TestContract(CompressorContract):
    @pytest.fixture(params=[VisibleTopK(), VisibleTopK(0.1, "bfloat16")], ids=repr)
    def compressor(self, request: pytest.FixtureRequest) -> Compressor:
        return AtWeights(request.param)


floats = st.floats(-(2.0**40), 2.0**40, width=32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Weights, and changes that lie about the border of what their bf16 casts show."""
    values, changes = [], []
    for value in draw(st.lists(floats | st.floats(-1, 1, width=32), min_size=1, max_size=60)):
        step = abs(value) * 2.0**-9 * draw(st.sampled_from([0.0, 0.4, 0.5, 0.99, 1.0, 1.01, 2.0, 300.0]))
        values.append(value)
        changes.append(draw(st.sampled_from([step, -step]) | floats))
    return torch.tensor(values), torch.tensor(changes)


def state_at(compressor: VisibleTopK, reference: Tensor) -> State:
    return compressor.init(Layout(((reference.numel(),),))) | {"reference": reference}


@given(cases())
def test_what_is_sent_is_exactly_the_visible_set(case: tuple[Tensor, Tensor]) -> None:
    reference, update = case
    compressor = VisibleTopK()
    sent, _ = compressor.select(update, state_at(compressor, reference))
    expected = [
        i
        for i, (weight, change) in enumerate(zip(reference, update, strict=True))
        if (weight - change).bfloat16().view(torch.int16).item() != weight.bfloat16().view(torch.int16).item()
    ]
    assert sent.tolist() == expected


@given(cases())
def test_the_bf16_weights_are_those_that_everything_would_give(case: tuple[Tensor, Tensor]) -> None:
    reference, update = case
    compressor = VisibleTopK()
    packet, _ = compressor.encode(update, state_at(compressor, reference))
    got, expected = (reference - compressor.decode(packet)).bfloat16(), (reference - update).bfloat16()
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


@given(cases(), st.floats(0.01, 1.0))
def test_a_cap_keeps_the_largest_of_the_visible(case: tuple[Tensor, Tensor], density: float) -> None:
    reference, update = case
    compressor = VisibleTopK(density)
    sent, _ = compressor.select(update, state_at(compressor, reference))
    seen = visible(update, reference).nonzero().view(-1)
    due = min(seen.numel(), compressor.count(update.numel()))
    ranked = seen[update[seen].abs().sort(descending=True, stable=True).indices[:due]]
    assert sent.tolist() == sorted(ranked.tolist())


def test_small_changes_wait_until_together_they_show() -> None:
    reference, step = torch.ones(4), torch.tensor([2.0**-12, 0.0, -(2.0**-12), 2.0**-3])
    feedback = ErrorFeedback(VisibleTopK())
    state, total, counts = feedback.init(Layout(((4,),))), torch.zeros(4), []
    for _ in range(40):
        state["inner"] = state["inner"] | {"reference": reference}
        packet, state = feedback.encode(step, state)
        sent = feedback.decode(packet)
        reference, total = reference - sent, total + sent
        counts.append((sent != 0).tolist())
        assert torch.equal(total + state["residual"], torch.stack([step] * len(counts)).sum(0)), "nothing is lost"
    moved = torch.tensor(counts).sum(0).tolist()
    assert moved[3] == 40, "what shows is sent at once"
    assert 2 <= moved[0] <= 10, "sixteen steps make a unit in the last place of bf16 below 1"
    assert moved[1] == 0
    assert 1 <= moved[2] <= 5, "above 1 it takes twice as many"


@pytest.mark.parametrize("way", ["split", "gather"])
@pytest.mark.parametrize("density", [1.0, 0.02])
def test_all_ranks_together_lose_nothing(way: str, density: float) -> None:
    n, steps, size = 700, 6, 3
    compressor = VisibleTopK(density)

    def update(rank: int, step: int) -> Tensor:
        return torch.randn(n, generator=torch.Generator().manual_seed(10 * step + rank)) * weights(n).abs() * 3e-3

    def work(group: MemoryGroup) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        reference, residual, carry = weights(n), torch.zeros(n), Carry()
        state, applied, counts = compressor.init(Layout(((n,),))), torch.zeros(n, dtype=torch.float64), []
        for step in range(steps):
            residual += update(group.rank, step)
            positions, state = compressor.select(residual, state | {"reference": reference})
            options = {"finite": True, "compressor": compressor, "group": group, "carry": carry}
            if way == "split":
                reduced, carry = split(residual[positions], positions, n, keep=compressor.count(n), **options)  # type: ignore[arg-type]
            else:
                reduced, carry = gather(residual[positions], positions, n, **options)  # type: ignore[arg-type]
            assert reduced is not None
            assert reduced.positions is not None
            mean = torch.zeros(n)
            mean[reduced.positions] = reduced.values
            reference, applied = reference - mean, applied + mean
            for credit in reduced.credits:
                residual[credit.positions] -= credit.values
            counts.append(positions.numel())
        return applied, residual.double(), reference, counts

    results = together(size, work)
    true = sum(update(r, s).double() for r in range(size) for s in range(steps)) / size
    have = results[0][0] + sum(residual for _, residual, _, _ in results) / size
    torch.testing.assert_close(have, true, rtol=1e-5, atol=1e-9)
    assert all(torch.equal(reference, results[0][2]) for _, _, reference, _ in results)
    counts = [count for _, _, _, each in results for count in each]
    assert 0 < max(counts) < n
    assert len(set(counts)) == 1 if density < 1 else len(set(counts)) > 1, "how many are sent depends on the values"


@pytest.mark.parametrize("reference", [None, torch.ones(3), torch.ones(4).double(), torch.ones(2, 2)])
def test_without_the_weights_nothing_can_be_said(reference: Tensor | None) -> None:
    compressor = VisibleTopK()
    state = compressor.init(Layout(((4,),)))
    with pytest.raises(MisuseError, match="reference"):
        compressor.encode(torch.ones(4), state if reference is None else state | {"reference": reference})

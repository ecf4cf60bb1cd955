"""Exchange over threads as ranks: saving, another number of ranks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compress.ranks import together
from tests.integrations.exchanging import Trainer, gradient
from thinwire.compress import (
    ErrorFeedback,
    Int8,
    Quantize,
    RandomK,
    TopK,
    Warmup,
)
from thinwire.compress.group import MemoryGroup
from thinwire.errors import MisuseError
from thinwire.integrations.exchange import Exchange, LayerBudget, reshard


@pytest.mark.parametrize("mode", ["split", "mask"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_saved_run_goes_on_bit_for_bit(momentum: float, mode: str) -> None:
    compressor = ErrorFeedback(TopK(0.05, "int8"), momentum=momentum)

    def whole(group: MemoryGroup) -> Tensor:
        trainer = Trainer(group, compressor, mode=mode, schedule=Warmup(0.5, 0.05, 5))
        return [trainer.step(s) for s in range(8)][-1]

    def first(group: MemoryGroup) -> dict[str, Any]:
        trainer = Trainer(group, compressor, mode=mode, schedule=Warmup(0.5, 0.05, 5))
        for s in range(4):
            trainer.step(s)
        return trainer.exchange.state_dict()

    states = together(2, first)

    def second(group: MemoryGroup) -> Tensor:
        trainer = Trainer(group, compressor, mode=mode, schedule=Warmup(0.5, 0.05, 5))
        trainer.exchange.load_state_dict(states[group.rank])
        return [trainer.step(s) for s in range(4, 8)][-1]

    for a, b in zip(together(2, whole), together(2, second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (3, 5), (4, 1), (1, 3)])
def test_another_number_of_ranks_keeps_the_mean_residual(old: int, new: int) -> None:
    compressor = ErrorFeedback(TopK(0.05), momentum=0.5)

    def saved(group: MemoryGroup) -> dict[str, Any]:
        trainer = Trainer(group, compressor, mode="split")
        for s in range(3):
            trainer.step(s)
        return trainer.exchange.state_dict()

    states = together(old, saved)
    others = reshard(states, new)
    assert [(s["rank"], s["world_size"]) for s in others] == [(r, new) for r in range(new)]
    for key in states[0]["parameters"]:
        for name in ("residual", "velocity"):
            before = sum(s["parameters"][key][name].double() for s in states) / old
            after = sum(s["parameters"][key][name].double() for s in others) / new
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)

    def goes_on(group: MemoryGroup) -> Tensor:
        trainer = Trainer(group, compressor, mode="split")
        trainer.exchange.load_state_dict(others[group.rank])
        return trainer.step(9)

    assert together(new, goes_on)[0].isfinite().all()


def test_states_that_do_not_belong_together_are_refused() -> None:
    def saved(group: MemoryGroup) -> dict[str, Any]:
        trainer = Trainer(group, ErrorFeedback(TopK(0.05)))
        trainer.step(0)
        return trainer.exchange.state_dict()

    states = together(2, saved)
    with pytest.raises(MisuseError, match="not the states of all ranks"):
        reshard([states[0], states[0]], 4)
    with pytest.raises(MisuseError, match="0 states"):
        reshard([], 4)

    def load(group: MemoryGroup) -> str:
        trainer = Trainer(group, ErrorFeedback(TopK(0.01)))
        with pytest.raises(MisuseError, match="compressor"):
            trainer.exchange.load_state_dict(states[group.rank])
        trainer = Trainer(group, ErrorFeedback(TopK(0.05)))
        with pytest.raises(MisuseError, match="rank"):
            trainer.exchange.load_state_dict(states[1 - group.rank])
        return "refused"

    assert together(2, load) == ["refused"] * 2


def test_unlike_compressors_are_found_when_the_exchange_is_made() -> None:
    def work(group: MemoryGroup) -> str:
        with pytest.raises(MisuseError) as caught:
            Exchange(ErrorFeedback(TopK(0.01 if group.rank else 0.02)), group)
        return str(caught.value)

    assert all("rank 0" in said and "0.02" in said and "rank 1" in said for said in together(2, work))


@pytest.mark.parametrize(
    ("compressor", "options", "match"),
    [
        (TopK(0.1), {"mode": "fast"}, "mode"),
        (Quantize(Int8()), {"mode": "split"}, "sparse"),
        (RandomK(0.1), {"layer_budget": LayerBudget()}, "TopK"),
        ("topk", {}, "Sparsifier"),
    ],
)
def test_misuse_says_what_to_give(compressor: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(MisuseError, match=match):
        Exchange(compressor, MemoryGroup.of(1)[0], **options)


def test_one_rank_sends_nothing_and_gets_its_gradient_back() -> None:
    group = MemoryGroup.of(1)[0]
    trainer = Trainer(group, ErrorFeedback(TopK(0.01)))
    assert torch.equal(trainer.step(0), gradient(0, 0))
    assert trainer.exchange.traffic().received_bytes == 0


def test_integer_gradients_are_refused() -> None:
    def work(group: MemoryGroup) -> None:
        with pytest.raises(MisuseError, match="int64"):
            Exchange(TopK(0.1), group).reduce_(torch.ones(4, dtype=torch.int64), ["x"], [(4,)])

    together(2, work)

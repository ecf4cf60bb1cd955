"""Local steps: exact resumption, other ranks, and what goes wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compress.ranks import together
from tests.integrations.local_training import COMPRESSORS, STEPS, Worker, adamw, make, same, sgd
from thinwire.compress import ErrorFeedback, TopK
from thinwire.compress.group import Group, MemoryGroup
from thinwire.compress.visible import VisibleTopK
from thinwire.errors import MisuseError
from thinwire.integrations.ddp import CompressedAllReduce
from thinwire.integrations.local_steps import LocalSteps

# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [6, 7])
@pytest.mark.parametrize("name", ["split", "visible", "low rank"])
def test_a_resumed_run_is_the_same_to_the_bit(cut: int, name: str) -> None:
    compressor, mode = COMPRESSORS[name]

    def work(group: MemoryGroup) -> bool:
        def fresh() -> Worker:
            return Worker(group, compressor, optimizer=adamw, mode=mode, chunk_numel=400)

        straight = fresh().train()
        half = fresh().train(range(cut))
        resumed = fresh().load(half.save()).train(range(cut, STEPS))
        return same(straight.parameters(), resumed.parameters()) and same(straight.waiting(), resumed.waiting())

    assert together(2, work) == [True, True]


def test_a_saved_state_does_not_hold_the_weights_twice() -> None:
    def work(group: MemoryGroup) -> list[set[str]]:
        worker = Worker(group, ErrorFeedback(VisibleTopK()), mode="shared").train()
        return [set(unit["inner"]) for unit in worker.exchange.state_dict()["units"]]

    assert all("reference" not in inner for units in together(2, work) for inner in units)


def test_other_ranks_take_over_after_an_outer_step() -> None:
    compressor = ErrorFeedback(TopK(0.05))
    saved = together(2, lambda group: Worker(group, compressor).train(range(6)).save())
    states = CompressedAllReduce.reshard([state["exchange"] for state in saved], 3)

    def work(group: MemoryGroup) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        worker = Worker(group, compressor).load({**saved[0], "exchange": states[group.rank]})
        waiting, start = worker.waiting(), worker.parameters()
        return waiting, start, worker.train(range(6, STEPS)).parameters()

    results = together(3, work)
    before = [{k: v["residual"].double() for k, v in state["exchange"]["parameters"].items()} for state in saved]
    for key in before[0]:
        was = sum(waiting[key] for waiting in before) / 2
        now = sum(waiting[key] for waiting, _, _ in results) / 3
        torch.testing.assert_close(now.view(-1), was.view(-1), rtol=1e-6, atol=1e-9)
    assert all(same(parameters, results[0][2]) for _, _, parameters in results)
    assert not same(results[0][1], results[0][2])


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_rank_with_nan_spoils_the_round_and_nothing_else() -> None:
    def work(group: MemoryGroup) -> None:
        worker = Worker(group, ErrorFeedback(TopK(0.05)), optimizer=adamw).train(range(6))
        parameters, waiting = worker.parameters(), worker.waiting()
        momentum = worker.outer.state_dict()["momentum"]
        worker.inner(6)
        if group.rank == 1:
            worker.model.first.weight.grad[3, 4] = float("nan")
            worker.optimizer.step()
        worker.outer.step()
        worker.train(range(7, 9))
        assert worker.outer.skipped == 1
        assert worker.outer.inner_steps == 0
        assert same(worker.parameters(), parameters), "back to the anchor"
        assert same(worker.waiting(), waiting)
        assert same(worker.outer.state_dict()["momentum"], momentum)
        forgotten = [name for name, p in worker.model.named_parameters() if p.grad is not None
                     and p.requires_grad and p not in worker.optimizer.state]  # fmt: skip
        assert ("first.weight" in forgotten) == (group.rank == 1)
        worker.train(range(9, 12))
        assert worker.outer.skipped == 1
        assert not same(worker.parameters(), parameters), "the next round counts again"
        assert all(p.isfinite().all() for p in worker.parameters().values())

    together(3, work)


def test_a_mean_that_overflows_is_left_out_on_all_ranks() -> None:
    def work(group: MemoryGroup) -> tuple[int, list[float]]:
        model = nn.Linear(2, 1)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        exchange = CompressedAllReduce(group=group)
        outer = LocalSteps(
            model, sgd(model.parameters()), exchange, every=1, outer_lr=1.0, outer_momentum=0.0, chunk_numel=2
        )
        with torch.no_grad():
            model.weight[0, 0], model.bias[0] = 3e38, 1.0
        outer.step()
        return outer.skipped, [*model.weight[0].tolist(), model.bias.item()]

    assert together(2, work) == [(1, [0.0, 0.0, 1.0])] * 2


def expect(match: str, make_one: Callable[[Group], Any], size: int = 2) -> None:
    def work(group: MemoryGroup) -> None:
        with pytest.raises(MisuseError, match=match):
            make_one(group)

    together(size, work, timeout_s=5.0)


def test_what_cannot_be_meant_is_refused() -> None:
    for wrong in ({"every": 0}, {"outer_lr": 0.0}, {"outer_momentum": 1.0}, {"chunk_numel": 0}):
        expect("give", lambda group, wrong=wrong: Worker(group, **wrong), size=1)
    expect("float64", lambda group: Worker(group, dtype=torch.float64), size=1)
    expect("ranks 0 and 1 differ", lambda group: Worker(group, every=3 + group.rank))

    def other_start(group: Group) -> None:
        model = make()
        with torch.no_grad():
            model.first.bias += group.rank * 1e-7
        LocalSteps(model, sgd(model.parameters()), CompressedAllReduce(group=group))

    expect("the same parameters", other_start)

    def with_rates(group: Group) -> None:
        model = make()
        optimizer = sgd(model.parameters())
        LocalSteps(model, optimizer, CompressedAllReduce(group=group, optimizer=optimizer))

    expect("without scaler and optimizer", with_rates, size=1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.update(version=9),
        lambda state: state["anchor"].pop("first.weight"),
        lambda state: state["momentum"].update({"first.bias": torch.zeros(3)}),
    ],
)
def test_a_state_of_something_else_is_refused(damage: Callable[[dict[str, Any]], Any]) -> None:
    outer = Worker(MemoryGroup.of(1)[0]).outer
    state = copy.deepcopy(outer.state_dict())
    damage(state)
    with pytest.raises(MisuseError):
        outer.load_state_dict(state)

"""Exchange over threads as ranks: the law through everything that a training run does to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compress.ranks import together
from tests.integrations.exchanging import SHAPES, SIZES, TOTAL, Trainer, check_law, gradient, true_sum
from thinwire.compress import (
    Accordion,
    Compressor,
    ErrorFeedback,
    Int8,
    Plateau,
    Quantize,
    RandomK,
    TopK,
    Warmup,
)
from thinwire.compress.group import MemoryGroup
from thinwire.integrations.exchange import LayerBudget


def test_momentum_correction_sends_the_velocity() -> None:
    def work(group: MemoryGroup) -> tuple[Tensor, Tensor]:
        trainer = Trainer(group, ErrorFeedback(TopK(0.05), momentum=0.9, masking=False), mode="split")
        for s in range(5):
            trainer.step(s)
        return trainer.applied, trainer.residual()

    results = together(2, work)
    velocity, expected = torch.zeros(TOTAL).double(), torch.zeros(TOTAL).double()
    for s in range(5):
        velocity = 0.9 * velocity + true_sum(2, [s])
        expected += velocity
    check_law(results[0][0], [r for _, r in results], expected)


def test_factor_masking_clears_the_velocity_of_what_was_sent() -> None:
    def work(group: MemoryGroup) -> tuple[Tensor, Tensor]:
        trainer = Trainer(group, ErrorFeedback(TopK(0.05), momentum=0.9), mode="gather")
        mean = trainer.step(0)
        velocity = torch.cat([p["velocity"] for p in trainer.exchange.state_dict()["parameters"].values()])
        return mean, velocity

    results = together(1 + 1, work)
    sent = results[0][0] != 0
    assert all(bool((velocity == 0)[sent].any()) and bool((velocity != 0)[~sent].all()) for _, velocity in results)


class Scaler:
    """What Exchange asks of torch's GradScaler."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


def overflow(rank: int, flat: Tensor) -> None:
    if rank == 1:
        flat[123] = float("inf")


@pytest.mark.parametrize("compressor", [TopK(0.05), RandomK(0.05), Quantize(Int8())], ids=repr)
def test_a_step_that_overflows_leaves_the_residual_bit_for_bit(compressor: Compressor) -> None:
    def work(group: MemoryGroup) -> tuple[bool, Tensor, Tensor]:
        scaler = Scaler(2.0**10)
        trainer = Trainer(group, ErrorFeedback(compressor, momentum=0.5), scaler=scaler, mode=fixed(compressor))
        trainer.step(0, scale=scaler.scale)
        trainer.step(1, scale=scaler.scale)
        before = trainer.residual()
        mean = trainer.step(2, scale=scaler.scale, changes=[overflow])
        unchanged = torch.equal(trainer.residual(), before)
        scaler.scale /= 2  # as GradScaler does
        trainer.step(3, scale=scaler.scale)
        return unchanged and bool(mean.isnan().all()), trainer.applied, trainer.residual()

    results = together(2, work)
    assert all(good for good, _, _ in results)
    plain = together(2, lambda group: skipping(group, compressor))
    assert torch.equal(results[0][1], plain[0]), "the scale is a power of two, so not a bit may differ"


def fixed(compressor: Compressor) -> str:
    """A mode that does not follow from how busy the machine is."""
    return "split" if isinstance(compressor, TopK) else "auto"


def skipping(group: MemoryGroup, compressor: Compressor) -> Tensor:
    trainer = Trainer(group, ErrorFeedback(compressor, momentum=0.5), mode=fixed(compressor))
    for s in (0, 1, 3):
        trainer.step(s)
    return trainer.applied


def test_without_rollback_an_overflow_costs_only_what_it_hit() -> None:
    def work(group: MemoryGroup) -> float:
        trainer = Trainer(group, ErrorFeedback(TopK(0.05)))
        trainer.step(0)
        before = trainer.residual()
        trainer.step(1, changes=[overflow])
        change = (trainer.residual() - before).abs()
        change[123] = 0
        return float(change.max())

    assert max(together(2, work)) < 1e-5


def test_a_change_of_the_learning_rate_is_made_up_for() -> None:
    rates = [0.1, 0.1, 0.03, 0.03, 0.01, 0.2]

    def work(group: MemoryGroup) -> tuple[Tensor, Tensor]:
        now = {"rate": 0.0}
        trainer = Trainer(group, ErrorFeedback(TopK(0.05)), mode="split", learning_rate_of=lambda key: now["rate"])
        for s, rate in enumerate(rates):
            now["rate"] = rate
            trainer.step(s, weight=rate)
        return trainer.applied, trainer.residual() * rates[-1]

    results = together(2, work)
    true = sum(rate * true_sum(2, [s]) for s, rate in enumerate(rates))
    check_law(results[0][0], [r for _, r in results], true)


@pytest.mark.parametrize("rollback", [False, True])
def test_parameters_may_follow_rates_of_their_own(rollback: bool) -> None:
    rates = {"a": [0.1, 0.1, 0.01], "b": [0.1, 0.2, 0.4], "c": [0.1, 0.1, 0.1]}
    weights = [torch.cat([torch.full((SIZES[k],), rates[k][s]).double() for k in SHAPES]) for s in range(3)]

    def work(group: MemoryGroup) -> tuple[Tensor, Tensor]:
        now = {"step": 0}
        trainer = Trainer(group, ErrorFeedback(TopK(0.05)), mode="split", rollback=rollback,
                          learning_rate_of=lambda key: rates[key][now["step"]])  # fmt: skip
        total = torch.zeros(TOTAL).double()
        for s in range(3):
            now["step"] = s
            total += weights[s] * trainer.step(s).double()
        return total, trainer.residual() * weights[-1]

    results = together(2, work)
    check_law(results[0][0], [r for _, r in results], sum(weights[s] * true_sum(2, [s]) for s in range(3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_gradients_keep_their_rounding_in_the_residual(dtype: torch.dtype) -> None:
    def work(group: MemoryGroup) -> tuple[Tensor, Tensor]:
        trainer = Trainer(group, ErrorFeedback(TopK(0.05)), mode="split")
        for s in range(4):
            trainer.step(s, dtype=dtype)
        return trainer.applied, trainer.residual()

    results = together(2, work)
    true = sum(gradient(r, s).to(dtype).double() for r in range(2) for s in range(4)) / 2
    check_law(results[0][0], [r for _, r in results], true)


def unused(key: str) -> Callable[[int, Tensor], None]:
    def change(rank: int, flat: Tensor) -> None:
        dict(zip(SHAPES, torch.split(flat, list(SIZES.values())), strict=True))[key].zero_()

    return change


@pytest.mark.parametrize("rollback", [False, True])
def test_what_waits_for_a_parameter_nobody_used_is_not_sent(rollback: bool) -> None:
    def work(group: MemoryGroup) -> bool:
        trainer = Trainer(group, ErrorFeedback(TopK(0.05), momentum=0.9), unused_parameters=True, rollback=rollback)
        trainer.step(0)
        before = trainer.exchange.state_dict()["parameters"]["a"]
        mean = trainer.step(1, changes=[unused("a")])
        after = trainer.exchange.state_dict()["parameters"]["a"]
        same = all(torch.equal(before[name], after[name]) for name in ("residual", "velocity"))
        return same and not mean[: SIZES["a"]].any() and bool(mean.any())

    assert all(together(2, work))


@pytest.mark.parametrize("schedule", [Warmup(0.5, 0.01, 4), Plateau(), Accordion()], ids=lambda s: type(s).__name__)
def test_a_schedule_gives_all_ranks_the_same_densities(schedule: Any) -> None:
    def work(group: MemoryGroup) -> tuple[list[float], Tensor, Tensor]:
        trainer = Trainer(group, ErrorFeedback(TopK(0.3)), mode="split", schedule=schedule)
        densities = []
        for s in range(6):
            trainer.exchange.observe("loss", 10.0 / (1 + s) + group.rank)
            trainer.step(s)
            densities.append(trainer.exchange.reduction.compressor.density)
        return densities, trainer.applied, trainer.residual()

    results = together(2, work)
    assert results[0][0] == results[1][0]
    if isinstance(schedule, Warmup):
        assert results[0][0][0] == 0.5
        assert results[0][0][-1] == 0.01
    check_law(results[0][1], [r for _, _, r in results], true_sum(2, range(6)))


def test_a_layer_budget_gives_the_layers_with_the_larger_gradients_more() -> None:
    def louder(rank: int, flat: Tensor) -> None:
        torch.split(flat, list(SIZES.values()))[2].mul_(20.0)

    def work(group: MemoryGroup) -> tuple[dict[str, int], Tensor]:
        trainer = Trainer(
            group, ErrorFeedback(TopK(0.1)), mode="split", layer_budget=LayerBudget(every=2, whole_below=40)
        )
        for s in range(5):
            mean = trainer.step(s, changes=[louder])
        return trainer.exchange.state_dict()["control"]["counts"], mean

    results = together(2, work)
    counts = results[0][0]
    assert counts == results[1][0]
    assert sum(counts.values()) == round(0.1 * TOTAL)
    assert counts["b"] == 37, "a small parameter is sent whole"
    assert counts["c"] > 5 * counts["a"]
    assert int((results[0][1] != 0).sum()) == sum(counts.values())


def test_a_budget_by_sensitivity_looks_at_the_weights() -> None:
    def work(group: MemoryGroup) -> dict[str, int]:
        weights = {key: torch.full(SHAPES[key], 100.0 if key == "a" else 0.01) for key in SHAPES}
        budget = LayerBudget(every=1, score="sensitivity")
        trainer = Trainer(group, ErrorFeedback(TopK(0.1)), mode="split", layer_budget=budget, weight_of=weights.get)
        for s in range(3):
            trainer.step(s)
        return trainer.exchange.state_dict()["control"]["counts"]

    counts = together(2, work)[0]
    assert counts["a"] > 10 * counts["c"]

"""Exchange over threads as ranks: nothing is lost, whatever carries it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compress.ranks import together
from tests.integrations.exchanging import SHAPES, SIZES, TOTAL, Trainer, check_law, gradient, true_sum
from thinwire.compress import (
    BlockTopK,
    Compressor,
    ErrorFeedback,
    Int8,
    LowRank,
    Quantize,
    RandomK,
    Sign,
    Threshold,
    TopK,
)
from thinwire.compress.group import MemoryGroup
from thinwire.integrations.exchange import Exchange

COMPRESSORS = [
    TopK(0.05), TopK(0.05, "bfloat16"), BlockTopK(0.05, block=8), Threshold(0.05), RandomK(0.05), Quantize(Int8()),
    Quantize(Sign()), LowRank(2),
]  # fmt: skip


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_nothing_is_lost_over_the_steps(compressor: Compressor, rollback: bool) -> None:
    def work(group: MemoryGroup) -> tuple[Tensor, Tensor]:
        trainer = Trainer(group, ErrorFeedback(compressor), rollback=rollback)
        for s in range(6):
            trainer.step(s)
        return trainer.applied, trainer.residual()

    results = together(3, work)
    check_law(results[0][0], [r for _, r in results], true_sum(3, range(6)))


@pytest.mark.parametrize("mode", ["auto", "split", "gather", "shared", "mask", "dense"])
def test_every_mode_keeps_the_law(mode: str) -> None:
    def work(group: MemoryGroup) -> tuple[Tensor, Tensor]:
        trainer = Trainer(group, ErrorFeedback(TopK(0.02)), mode=mode)
        for s in range(5):
            trainer.step(s)
        return trainer.applied, trainer.residual()

    results = together(4, work)
    check_law(results[0][0], [r for _, r in results], true_sum(4, range(5)))


@pytest.mark.parametrize("compressor", [*COMPRESSORS[:5], Quantize(Int8())], ids=repr)
@pytest.mark.parametrize("mode", ["auto", "split", "gather", "shared", "mask"])
def test_units_that_travel_together_lose_nothing_either(mode: str, compressor: Compressor) -> None:
    if isinstance(compressor, Quantize) and mode != "auto":
        pytest.skip("not sparse")

    def work(group: MemoryGroup) -> tuple[Tensor, Tensor, int]:
        exchange, applied = Exchange(ErrorFeedback(compressor, momentum=0.0), group, mode=mode), torch.zeros(TOTAL)
        for s in range(5):
            flat = gradient(group.rank, s)
            pieces = torch.split(flat, list(SIZES.values()))
            for key, piece in zip(SHAPES, pieces, strict=True):
                exchange.add(piece, [key], [SHAPES[key]])
            assert exchange.pending_numel == TOTAL
            exchange.flush()
            applied += flat
        parts = exchange.state_dict()["parameters"]
        return applied.double(), torch.cat([parts[key]["residual"] for key in SHAPES]).double(), group.received_bytes

    results = together(3, work)
    assert all(torch.equal(applied, results[0][0]) for applied, _, _ in results)
    check_law(results[0][0], [r for _, r, _ in results], true_sum(3, range(5)))


def test_what_travels_together_makes_fewer_rounds() -> None:
    class Counting:
        def __init__(self, group: MemoryGroup) -> None:
            self.group, self.rounds = group, 0

        def __getattr__(self, name: str) -> Any:
            if name in ("all_to_all", "all_gather"):
                self.rounds += 1
            return getattr(self.group, name)

    def work(group: MemoryGroup) -> tuple[int, int]:
        counted = Counting(group)
        exchange = Exchange(ErrorFeedback(TopK(0.05)), counted, mode="split")  # type: ignore[arg-type]
        rounds = []
        for at_once in (True, False):
            before = counted.rounds
            for key in SHAPES:
                exchange.add(torch.ones(SIZES[key]), [key], [SHAPES[key]])
                if not at_once:
                    exchange.flush()
            exchange.flush()
            rounds.append(counted.rounds - before)
        return rounds[0], rounds[1]

    for together_rounds, apart in together(2, work):
        assert apart == len(SHAPES) * together_rounds


def test_a_bad_gradient_undoes_all_that_travelled_with_it() -> None:
    def work(group: MemoryGroup) -> bool:
        exchange = Exchange(ErrorFeedback(TopK(0.05)), group, mode="split", rollback=True)
        for s in range(2):
            before = exchange.state_dict()["parameters"]
            flats = {key: gradient(group.rank, s)[: SIZES[key]].clone() for key in SHAPES}
            if s == 1 and group.rank == 0:
                flats["b"][3] = float("nan")
            for key, flat in flats.items():
                exchange.add(flat, [key], [SHAPES[key]])
            exchange.flush()
        after = exchange.state_dict()["parameters"]
        same = all(torch.equal(before[key]["residual"], after[key]["residual"]) for key in SHAPES)
        return same and all(bool(flat.isnan().all()) for flat in flats.values())

    assert all(together(2, work))


def test_a_mask_serves_for_sixteen_steps_and_then_follows_the_gradients() -> None:
    def work(group: MemoryGroup) -> list[tuple[list[int], int]]:
        trainer, seen = Trainer(group, ErrorFeedback(TopK(0.05)), mode="mask"), []
        for s in range(18):
            before = group.received_bytes
            trainer.step(s)
            mask = next(iter(trainer.exchange.state_dict()["units"]))["mask"]
            seen.append((mask.tolist(), group.received_bytes - before))
        return seen

    results = together(2, work)
    masks, received = zip(*results[0], strict=True)
    assert list(masks) == [mask for mask, _ in results[1]]
    assert all(mask == masks[0] for mask in masks[:16])
    assert masks[16] != masks[0]
    assert masks[17] == masks[16]
    assert max(received[1:16]) < received[0], "only values travel"


def test_residuals_move_with_their_parameters_when_buckets_are_formed_anew() -> None:
    layouts = [("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")]

    def work(group: MemoryGroup) -> tuple[Tensor, Tensor]:
        trainer = Trainer(group, ErrorFeedback(TopK(0.02), momentum=0.0), mode="split")
        for s in range(6):
            trainer.step(s, layouts[s // 2])
        return trainer.applied, trainer.residual()

    results = together(2, work)
    check_law(results[0][0], [r for _, r in results], true_sum(2, range(6)))


def test_residual_reaches_a_plateau() -> None:
    def work(group: MemoryGroup) -> list[float]:
        trainer, norms = Trainer(group, ErrorFeedback(TopK(0.05)), mode="split"), []
        for s in range(200):
            trainer.step(s)
            if s % 40 == 39:
                norms.append(float(trainer.residual().norm()))
        return norms

    norms = together(2, work)[0]
    assert norms[-1] < 1.25 * norms[1], norms

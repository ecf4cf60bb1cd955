"""Exchange over threads as ranks: the law through everything a training run does to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compress.ranks import together
from thinwire.compress import (
    Accordion,
    BlockTopK,
    Compressor,
    ErrorFeedback,
    Int8,
    LowRank,
    Plateau,
    Quantize,
    RandomK,
    Sign,
    Threshold,
    TopK,
    Warmup,
)  # fmt: skip
from thinwire.compress.group import MemoryGroup
from thinwire.errors import MisuseError
from thinwire.integrations.exchange import Exchange, LayerBudget, reshard

SHAPES = {"a": (40, 10), "b": (37,), "c": (16, 30)}
SIZES = {key: int(torch.tensor(shape).prod()) for key, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())


def gradient(rank: int, step: int, n: int = TOTAL) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(n, generator=generator) ** 3


class Trainer:
    """One rank of a training loop that only adds up what it is given."""

    def __init__(self, group: MemoryGroup, compressor: Compressor | None, **options: Any) -> None:
        self.exchange = Exchange(compressor, group, **options)
        self.rank = group.rank
        self.applied = torch.zeros(TOTAL, dtype=torch.float64)

    def step(self, number: int, keys: tuple[str, ...] = tuple(SHAPES), weight: float = 1.0, **how: Any) -> Tensor:
        flat = gradient(self.rank, number)
        for change in how.get("changes", ()):
            change(self.rank, flat)
        scale = how.get("scale", 1.0)
        flat = (flat * scale).to(how.get("dtype", torch.float32))
        parts = dict(zip(SHAPES, torch.split(flat, list(SIZES.values())), strict=True))
        bucket = torch.cat([parts[key] for key in keys])
        self.exchange.reduce_(bucket, keys, [SHAPES[key] for key in keys])
        out = dict(zip(keys, torch.split(bucket, [SIZES[key] for key in keys]), strict=True))
        mean = torch.cat([out[key] for key in SHAPES])
        if mean.isfinite().all():
            self.applied += weight * mean.double() / scale
        return mean

    def residual(self) -> Tensor:
        parameters = self.exchange.state_dict()["parameters"]
        return torch.cat([parameters[key]["residual"] for key in SHAPES]).double()


def check_law(applied: Tensor, residuals: list[Tensor], true: Tensor, tolerance: float = 3e-6) -> None:
    have = applied + sum(residuals) / len(residuals)
    assert float((have - true).abs().max()) <= tolerance * float(true.abs().max())


def true_sum(size: int, steps: range | list[int]) -> Tensor:
    return sum((gradient(r, s).double() for r in range(size) for s in steps), start=torch.zeros(TOTAL).double()) / size


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
            trainer.exchange.observe(loss=10.0 / (1 + s) + group.rank)
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
        return trainer.exchange.state_dict()["counts"], mean

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
        return trainer.exchange.state_dict()["counts"]

    counts = together(2, work)[0]
    assert counts["a"] > 10 * counts["c"]


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

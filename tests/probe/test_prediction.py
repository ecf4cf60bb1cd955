"""Features are what they say, scores are fair to ties, and what is learned of one run is tested on another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thinwire.errors import MisuseError
from thinwire.probe.prediction import (
    FEATURES,
    PREDICTORS,
    ChangeHistory,
    Features,
    Watch,
    _boundary,
    features,
    sample_positions,
    score,
)
from thinwire.probe.prediction_models import Observation, compare, fit

VIEWS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models wait for threads longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- where rounding turns ---------------------------------------------------------------------------------------------


@given(
    weight=st.floats(-1e4, 1e4) | st.sampled_from([0.0, 1.0, -1.0, 2.0**-14, 2.0**-24, -(2.0**-133)]),
    up=st.booleans(),
    view=st.sampled_from(VIEWS),
)  # fmt: skip
def test_rounding_turns_behind_the_boundary_and_not_before(weight: float, up: bool, view: torch.dtype) -> None:
    start = torch.tensor([weight], dtype=torch.float64)
    way = 1.0 if up else -1.0
    distance, ulp = _boundary(start, torch.tensor([way]), view)
    seen = start.to(view)

    def at(share: float) -> Tensor:
        return (start + way * distance * share).to(view)

    assert 0 <= float(distance) <= float(ulp)
    assert torch.equal(at(0.99), seen)
    further = start + way * (distance + 0.01 * ulp)
    assert not torch.equal(further.to(view), seen)


def test_distances_are_halves_of_the_gaps_between_floats() -> None:
    weight = torch.tensor([1.0, 1.0, 3.0, -1.0, 0.0], dtype=torch.float64)
    towards = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    distance, ulp = _boundary(weight, towards, torch.bfloat16)
    smallest = 2.0**-133
    assert distance.tolist() == [2.0**-8, 2.0**-9, 2.0**-7, 2.0**-9, smallest / 2]
    assert ulp.tolist() == [2.0**-7, 2.0**-7, 2.0**-6, 2.0**-7, smallest]


# --- samples and histories --------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5), count=st.integers(1, 1000), seed=st.integers(0, 99))
def test_a_sample_has_the_size_asked_for_each_weight_once(sizes: list[int], count: int, seed: int) -> None:
    params = {f"p{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    found = sample_positions(params, count, seed=seed)
    assert list(found) == list(params)
    assert sum(map(len, found.values())) == min(count, sum(sizes))
    for name, at in found.items():
        assert bool((at[1:] > at[:-1]).all())
        assert not len(at) or 0 <= int(at[0]) <= int(at[-1]) < params[name].numel()


def test_every_weight_is_drawn_as_often_as_any_other() -> None:
    params = {"large": torch.zeros(90), "small": torch.zeros(10)}
    counts = torch.zeros(100)
    for seed in range(400):
        found = sample_positions(params, 30, seed=seed)
        counts[found["large"]] += 1
        counts[90 + found["small"]] += 1
    deviation = (counts - 120) / math.sqrt(400 * 0.3 * 0.7)
    assert float(deviation.abs().max()) < 4.5
    assert float(deviation.std()) == pytest.approx(1.0, abs=0.3)


def test_tied_weights_and_integers_are_not_drawn_twice_or_at_all() -> None:
    tied = torch.zeros(5)
    found = sample_positions({"a": tied, "b": tied, "ids": torch.arange(9)}, 100)
    assert {name: len(at) for name, at in found.items()} == {"a": 5}
    with pytest.raises(MisuseError, match="sample"):
        sample_positions({"a": tied}, 0)


def test_a_history_sees_bits_of_the_view() -> None:
    params = {"w": torch.tensor([1.0, 1.0, 0.0, math.nan]), "scale": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    history = ChangeHistory(sample_positions(params, 10))
    assert history.observe(params) is None
    params["w"] = torch.tensor([1.0 + 2.0**-20, 1.5, -0.0, math.nan])
    assert history.observe(params).tolist() == [False, True, True, False, False]  # type: ignore[union-attr]
    params["scale"] = torch.tensor(3.0)
    assert history.observe(params).tolist() == [False, False, False, False, True]  # type: ignore[union-attr]
    assert (history.steps, history.counts.tolist()) == (2, [0, 1, 1, 0, 1])
    own = ChangeHistory(history.positions, view=None)
    own.observe({"w": torch.ones(4), "scale": torch.tensor(1.0), "empty": torch.zeros(0)})
    now = {"w": torch.ones(4) + 2.0**-20, "scale": torch.tensor(1.0), "empty": torch.zeros(0)}
    assert own.observe(now).tolist() == [True] * 4 + [False]  # type: ignore[union-attr]


# --- features ---------------------------------------------------------------------------------------------------------


def trained(kind: type[torch.optim.Optimizer], steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A layer that is stepped with one gradient again and again, and what is watched of it."""
    generator = torch.Generator().manual_seed(0)
    params = {"w": nn.Parameter((torch.randn(50, 40, generator=generator) * 0.02).to(dtype))}
    gradient = torch.randn(50, 40, generator=generator).to(dtype)
    optimizer = kind(params.values(), **options)
    watch = Watch(params, optimizer, sample=1500)
    changed = None
    for _ in range(steps):
        params["w"].grad = gradient.clone()
        optimizer.step()
        changed = watch.after()
    return params, optimizer, watch, gradient, changed


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"lr": 3e-6}),
        (torch.optim.AdamW, {"lr": 3e-6, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 3e-6, "momentum": 0.5}),
    ],
)
def test_where_gradients_repeat_the_margin_says_what_changes(kind: Any, options: dict[str, Any]) -> None:
    params, optimizer, watch, gradient, _ = trained(kind, 30, **options)
    known = watch.before()
    foretold = known["margin"] > 0
    params["w"].grad = gradient.clone()
    optimizer.step()
    changed = watch.after()
    assert 5 < int(changed.sum()) < 1000
    assert int((foretold != changed).sum()) <= max(3, int(changed.sum()) // 20)  # an odd one lies on the boundary
    if kind is not torch.optim.SGD:
        torch.testing.assert_close(known["momentum"], torch.ones_like(known["momentum"]), rtol=1e-3, atol=1e-4)
        assert score(PREDICTORS["boundary"](known), changed).average_precision > 0.95


def test_features_are_finite_whatever_the_weights_and_the_state() -> None:
    params = {
        "w": nn.Parameter(torch.tensor([math.nan, math.inf, 0.0, 1e-45, 3e38])),
        "frozen": nn.Parameter(torch.ones(3), requires_grad=False),
        "other": nn.Parameter(torch.ones(2)),
    }
    optimizer = torch.optim.AdamW([params["w"], params["frozen"]], lr=1e-3)  # "other" is stepped by nobody
    watch = Watch(params, optimizer)
    for _ in range(2):
        known = watch.before()
        assert list(known) == list(FEATURES)
        assert all(t.shape == (10,) and t.dtype == torch.float32 and bool(t.isfinite().all()) for t in known.values())
        params["w"].grad = torch.tensor([1.0, math.nan, 0.0, 1.0, -1.0])
        optimizer.step()
        watch.after()
    assert watch.history.counts[-5:].tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stepped_in_place_lie_half_a_gap_from_every_boundary(dtype: torch.dtype) -> None:
    params, optimizer, _, _, _ = trained(torch.optim.Adam, 2, dtype, lr=1e-3)
    history = ChangeHistory(sample_positions(params, 500), view=None)
    history.observe(params)
    known = features(params, optimizer, history)
    gap = known["distance"] - known["ulp"]
    assert set(gap.tolist()) <= {-1.0, -2.0}  # below a power of two floats lie closer


def test_a_history_of_other_weights_is_refused() -> None:
    history = ChangeHistory({"gone": torch.arange(2)})
    with pytest.raises(MisuseError, match="'gone'"):
        features({"w": torch.ones(2)}, torch.optim.SGD([torch.ones(2)], lr=1.0), history)


# --- scores -----------------------------------------------------------------------------------------------------------


@given(
    values=st.lists(st.integers(0, 6), min_size=1, max_size=40), seed=st.integers(0, 999), count=st.none() | st.just(3)
)
def test_scores_are_sklearns_and_do_not_depend_on_the_order_of_ties(
    values: list[int], seed: int, count: int | None
) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.tensor(values, dtype=torch.float32)
    changed = torch.rand(len(values), generator=generator) < 0.4
    count = min(count, len(values)) if count is not None else None
    found = score(predicted, changed, count=count)
    if not bool(changed.any()):
        assert math.isnan(found.average_precision)
        assert found.base_rate == 0
        return
    expected = metrics.average_precision_score(changed.numpy(), predicted.numpy())
    assert found.average_precision == pytest.approx(expected)
    assert found.base_rate == pytest.approx(float(changed.float().mean()))
    order = torch.randperm(len(values), generator=generator)
    again = score(predicted[order], changed[order], count=count)
    assert again.precision == pytest.approx(found.precision)
    assert again.average_precision == pytest.approx(found.average_precision)
    if count is None:
        assert found.precision == pytest.approx(found.recall) == pytest.approx(found.f1)
    rights = found.precision * found.count
    assert rights == pytest.approx(found.recall * int(changed.sum()))


def test_ties_at_the_cut_count_by_their_share() -> None:
    found = score(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), torch.tensor([True, True, False, False, False]))
    assert found.precision == pytest.approx((1 + 0.25) / 2)  # one is sure, the other a draw of one in four
    nothing = score(torch.zeros(10), torch.tensor([True] + [False] * 9))
    assert (nothing.precision, nothing.average_precision) == (pytest.approx(0.1), pytest.approx(0.1))
    assert nothing.lift == pytest.approx(1.0)
    perfect = score(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, True, False]))
    assert (perfect.precision, perfect.average_precision) == (1.0, 1.0)
    every = score(torch.arange(4.0), torch.ones(4, dtype=torch.bool))
    assert (every.f1, every.average_precision, every.lift) == (1.0, 1.0, 1.0)


def test_scores_that_say_nothing_are_refused() -> None:
    changed = torch.tensor([True, False])
    for predicted, truth in (
        (torch.ones(3), changed), (torch.ones(1, 2), changed[None]), (torch.ones(2), torch.ones(2)),
        (torch.zeros(0), torch.zeros(0, dtype=torch.bool)), (torch.tensor([1.0, math.nan]), changed),
    ):  # fmt: skip
        with pytest.raises(MisuseError, match="scores"):
            score(predicted, truth)
    for count in (-1, 3):
        with pytest.raises(MisuseError, match="taken"):
            score(torch.ones(2), changed, count=count)


# --- models -----------------------------------------------------------------------------------------------------------


def watched(seed: int, steps: int = 8) -> list[Observation]:
    """A regression whose masters are trained by Adam at a rate at which some bf16 weights change."""
    generator = torch.Generator().manual_seed(seed)
    params = {"w": nn.Parameter(torch.randn(60, 80, generator=generator) * 0.05)}
    optimizer = torch.optim.Adam(params.values(), lr=2e-5)
    watch = Watch(params, optimizer, seed=seed)
    target = torch.randn(60, 80, generator=generator)
    found = []
    for step in range(steps + 4):
        inputs = torch.randn(16, 80, generator=generator)
        (inputs @ (params["w"] - target).T).square().mean().backward()
        known = watch.before()
        optimizer.step()
        optimizer.zero_grad()
        changed = watch.after()
        if step >= 4:
            found.append((known, changed))
    return found


def test_rules_that_know_more_foretell_more_and_models_carry_over() -> None:
    here, there = watched(0), watched(1)
    for test in (here[4:], there):  # later steps; another seed
        found = compare(here[:4], test, steps=100)
        mean = {name: sum(s.average_precision for s in scores) / len(scores) for name, scores in found.items()}
        base = sum(s.base_rate for s in found["random"]) / len(test)
        assert mean["random"] == pytest.approx(base, rel=0.2)
        assert mean["magnitude"] > 1.5 * base
        assert mean["boundary"] > mean["step / ulp"] > mean["random"]
        assert mean["logistic"] > 0.9 * mean["boundary"]
        assert mean["mlp"] > 0.9 * mean["boundary"]


@settings(max_examples=5)
@given(seed=st.integers(0, 99))
def test_equal_seeds_learn_equal_models_and_random_states_stay(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    known: Features = {"a": torch.randn(500, generator=generator), "b": torch.full((500,), 3.0)}
    changed = known["a"] + 0.5 * torch.randn(500, generator=generator) > 1
    state = torch.get_rng_state()
    for kind in ("logistic", "mlp"):
        first, second = (fit([(known, changed)], model=kind, names=("a", "b"), seed=seed, steps=60) for _ in range(2))  # type: ignore[arg-type]
        assert torch.equal(first(known), second(known))
        assert score(first(known), changed).lift > 1.5
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_learned_from_is_refused() -> None:
    known = {"a": torch.arange(4.0)}
    some = torch.tensor([True, False, False, True])
    for observations, names in (
        ([], ("a",)), ([(known, torch.zeros(4, dtype=torch.bool))], ("a",)), ([(known, some | ~some)], ("a",)),
        ([(known, some)], ("b",)), ([(known, some)], ()), ([(known, some[:2])], ("a",)),
        ([({"a": torch.tensor([1.0, math.nan, 0.0, 1.0])}, some)], ("a",)),
    ):  # fmt: skip
        with pytest.raises(MisuseError):
            fit(observations, names=names, steps=1)
    with pytest.raises(MisuseError, match="forest"):
        fit([(known, some)], model="forest", names=("a",))  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="missing"):
        fit([(known, some)], names=("a",), steps=1)({})

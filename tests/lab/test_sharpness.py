"""Smoothing keeps what it should, the experiment compares like with like, and its rows add up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.lab.grpo import advantages
from thinwire.lab.sharpness import (
    SMOOTHINGS,
    SharpnessOptions,
    _Descent,
    effective_number,
    sharpness,
    smooth,
    summarise,
)


def sharp(seed: int, answers: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return advantages((torch.rand(answers, generator=generator) < 0.2).float(), 8)


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@given(seed=st.integers(0, 999), kind=st.sampled_from(SMOOTHINGS))
def test_smoothing_keeps_the_size_and_depends_on_the_generator_alone(seed: int, kind: tuple[str, float]) -> None:
    advantage = sharp(seed)
    before = advantage.clone()
    first, second = (smooth(advantage, *kind, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(advantage, before)
    assert rms(first) == pytest.approx(rms(advantage), rel=1e-5)


@given(seed=st.integers(0, 999), level=st.floats(0.2, 20), other=st.floats(0.2, 20))
def test_a_higher_temperature_spreads_advantages_over_more_answers(seed: int, level: float, other: float) -> None:
    advantage = sharp(seed)
    low, high = sorted((level, other))
    cold, hot = (smooth(advantage, "temperature", t, torch.Generator()) for t in (low, high))
    assert effective_number(cold) <= effective_number(hot) * (1 + 1e-5)
    assert torch.equal(cold.sign(), advantage.sign())
    assert torch.equal(cold.abs().argsort(stable=True)[-1:].sign(), hot.abs().argsort(stable=True)[-1:].sign())


def test_the_ends_of_each_smoothing() -> None:
    advantage, generator = sharp(1), torch.Generator().manual_seed(0)
    torch.testing.assert_close(smooth(advantage, "temperature", 1.0, generator), advantage)
    torch.testing.assert_close(smooth(advantage, "noise", 0.0, generator), advantage)
    alike = smooth(advantage, "temperature", 1e9, generator)
    assert effective_number(alike) == pytest.approx(int((advantage != 0).sum()))
    drowned = smooth(advantage, "noise", 1e6, generator)
    assert abs(float(torch.corrcoef(torch.stack([drowned, advantage]))[0, 1])) < 0.4
    mixed = smooth(advantage, "shuffled", 0.0, generator)
    assert torch.equal(mixed.sort().values, advantage.sort().values)
    assert not torch.equal(mixed, advantage)


@pytest.mark.parametrize("kind", SMOOTHINGS)
def test_advantages_that_teach_nothing_stay_nothing(kind: tuple[str, float]) -> None:
    assert torch.equal(smooth(torch.zeros(8), *kind, torch.Generator()), torch.zeros(8))
    assert effective_number(torch.zeros(8)) == effective_number(torch.zeros(0)) == 0.0


@given(count=st.integers(1, 20), zeros=st.integers(0, 20), scale=st.floats(1e-3, 1e3))
def test_equal_advantages_are_as_many_as_they_are(count: int, zeros: int, scale: float) -> None:
    advantage = torch.cat([torch.full((count,), scale), torch.zeros(zeros)])
    assert effective_number(advantage) == pytest.approx(count)


@pytest.mark.parametrize(("name", "level"), [("noise", -1.0), ("temperature", 0.0), ("hot", 1.0), ("noise", math.nan)])
def test_smoothings_that_there_are_not_are_refused(name: str, level: float) -> None:
    with pytest.raises(MisuseError, match="smoothing"):
        smooth(torch.ones(2), name, level, torch.Generator())
    with pytest.raises(MisuseError, match="smoothing"):
        sharpness(SharpnessOptions(smoothings=((name, level),)))


def test_options_that_make_no_experiment_are_refused() -> None:
    with pytest.raises(MisuseError, match="nano"):
        sharpness(SharpnessOptions(recipe="giant"))
    with pytest.raises(MisuseError, match="descent"):
        sharpness(SharpnessOptions(optimiser="lion"))  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="step"):
        sharpness(SharpnessOptions(steps=0))
    with pytest.raises(MisuseError, match="plain"):
        summarise([{"seed": 0, "smoothing": "noise", "level": 1.0}])


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options = SharpnessOptions(
        seeds=(0,), steps=2, measured=(2,), kernel_answers=16,
        smoothings=(("none", 0.0), ("noise", 0.0), ("temperature", 8.0)),
    )  # fmt: skip
    shown: list[dict[str, Any]] = []
    found = sharpness(options, on_row=shown.append)
    torch.set_num_threads(threads)
    assert shown == found
    return found


def test_every_run_starts_from_the_same_weights_and_answers(rows: list[dict[str, Any]]) -> None:
    assert [(row["smoothing"], row["step"]) for row in rows] == [
        (name, step) for name in ("none", "noise", "temperature") for step in (1, 2)
    ]
    plain, unsmoothed, hot = (rows[i : i + 2] for i in (0, 2, 4))
    for a, b in zip(plain, unsmoothed, strict=True):  # no noise at all is the plain run, up to rounding
        assert a["reward"] == b["reward"]
        assert a["density"] == pytest.approx(b["density"], rel=0.02)
    assert plain[0]["reward"] == hot[0]["reward"]
    assert hot[0]["number"] > plain[0]["number"]


def test_rows_hold_what_they_say(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 0 < row["number"] <= row["answers"]
        assert 0 < row["density"] < 1
        assert ("rank_kernel" in row) == (row["step"] == 2)
        if row["step"] == 2:
            assert 1 <= row["rank_kernel_weighted"] <= 16
            assert 1 <= row["rank_kernel"] <= 16
            assert 0 < row["energy_first"] <= 1
            assert 0 < row["rank_gradient"] < row["rank_update"] <= 1  # Adam divides by size: noise counts as much
        else:
            assert row["density_total"] == row["density"]


def test_descent_moves_by_the_learning_rate_along_the_gradient() -> None:
    layer = torch.nn.Linear(30, 20).to(torch.bfloat16)
    layer.bias.requires_grad_(False)
    optimiser = _Descent(layer, 1e-3)
    before = next(optimiser.masters()).clone()
    layer(torch.randn(4, 30, dtype=torch.bfloat16)).square().sum().backward()
    gradient = layer.weight.grad.float()
    assert optimiser.step() == pytest.approx(float(gradient.norm()), rel=1e-5)
    moved = next(optimiser.masters()) - before
    assert rms(moved) == pytest.approx(1e-3, rel=1e-4)
    assert float(torch.cosine_similarity(moved.flatten(), gradient.flatten(), dim=0)) == pytest.approx(-1.0, abs=1e-3)
    assert torch.equal(layer.weight.detach(), next(optimiser.masters()).bfloat16())
    assert optimiser.step() == 0.0  # no gradient: nothing moves
    assert torch.equal(layer.weight.detach(), next(optimiser.masters()).bfloat16())


def test_descent_runs_where_adam_does() -> None:
    pytest.importorskip("transformers")
    options = SharpnessOptions(seeds=(0,), steps=1, measured=(), smoothings=(("none", 0.0),), optimiser="descent")
    (row,) = sharpness(options)
    assert 0 < row["density"] < 1


def test_a_summary_pairs_runs_of_one_seed() -> None:
    rows = [
        {"seed": seed, "smoothing": name, "level": 0.0, "step": step, "density": base + seed + 0.1 * step}
        for seed in (1, 2, 3)
        for name, base in (("none", 0.0), ("shuffled", 0.5 + 0.01 * seed))
        for step in (1, 2)
    ]
    plain, other = summarise(rows)
    assert plain["density_gap"] == plain["density_error"] == 0.0
    assert other["density"] - plain["density"] == pytest.approx(0.52)
    assert other["density_gap"] == pytest.approx(0.52)
    assert other["density_error"] == pytest.approx(0.01 / math.sqrt(3))
    assert math.isnan(other["rank_kernel"])
    assert math.isnan(summarise([row for row in rows if row["seed"] == 1])[1]["density_error"])

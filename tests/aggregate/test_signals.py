"""Signals keep their contract, and measure what they say."""

from __future__ import annotations

from math import inf, log, nan, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.aggregate import (
    SIGNALS,
    Agreement,
    CosineToPrevious,
    CosineToReference,
    GradientNormStability,
    HeldOutImprovement,
    LossEMA,
    Observation,
    Reading,
    Signal,
)
from thinwire.aggregate.base import State
from thinwire.aggregate.tracking import LAGS, follow, follower, reading
from thinwire.errors import MisuseError
from thinwire.testing.signals import SignalContract

ROWS = [
    *(signal() for signal in SIGNALS.values()),
    LossEMA(decay=0.9),
    LossEMA(decay=0.999),
]


class TestSignals(SignalContract):
    @pytest.fixture(params=ROWS, ids=repr)
    def signal(self, request: pytest.FixtureRequest) -> Any:
        return request.param


def test_the_table_has_them_all() -> None:
    assert set(SIGNALS.values()) == {
        LossEMA, GradientNormStability, CosineToPrevious, CosineToReference, HeldOutImprovement, Agreement,
    }  # fmt: skip


@pytest.mark.parametrize("decay", [-0.1, 1.0, nan, inf])
@pytest.mark.parametrize("signal", SIGNALS.values(), ids=SIGNALS)
def test_decays_are_checked(signal: Any, decay: float) -> None:
    with pytest.raises(MisuseError, match="decay"):
        signal(decay=decay)


# --- the average and its error ---------------------------------------------------------------------------------------


def tracked(values: Any, decay: float = 0.99) -> State:
    state = follower()
    for value in values:
        state = follow(state, float(value), decay)
    return state


@given(st.lists(st.floats(-1e6, 1e6), min_size=12, max_size=60), st.sampled_from([0.0, 0.5, 0.9, 0.999]))
def test_the_value_is_the_weighted_mean(values: list[float], decay: float) -> None:
    weights = [decay ** (len(values) - 1 - j) for j in range(len(values))]
    expected = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
    assert reading(tracked(values, decay)).value == pytest.approx(expected, rel=1e-9, abs=1e-6)


def noise(steps: int, seed: int, autocorrelation: float = 0.0) -> torch.Tensor:
    """Of variance 1."""
    fresh = torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = [float(fresh[0])]
    for x in (fresh[1:] * sqrt(1 - autocorrelation**2)).tolist():
        values.append(autocorrelation * values[-1] + x)
    return torch.tensor(values, dtype=torch.float64)


def test_white_noise_has_the_error_that_its_sample_size_says() -> None:
    found = [reading(tracked(noise(600, seed))) for seed in range(8)]
    assert sum(each.error for each in found) / 8 == pytest.approx(sqrt(1 / 199), rel=0.2)
    assert 0.6 < sum(each.noise for each in found) / 8 < 1.05


@pytest.mark.parametrize(("autocorrelation", "share"), [(0.3, 1.0), (0.5, 1.0), (0.8, 0.7)])
def test_autocorrelated_noise_has_a_larger_error(autocorrelation: float, share: float) -> None:
    """Its long-run variance is (1 + r) / (1 - r) times its variance. What outlasts the lags looked at is missed."""
    found = sum(reading(tracked(noise(800, seed, autocorrelation))).error for seed in range(8)) / 8
    assert found == pytest.approx(share * sqrt((1 + autocorrelation) / (1 - autocorrelation) / 199), rel=0.3)


def test_a_line_is_no_noise() -> None:
    slope = torch.arange(400, dtype=torch.float64) * -0.5
    flat, steep = reading(tracked(noise(400, 3))), reading(tracked(noise(400, 3) + slope))
    assert steep.noise == pytest.approx(flat.noise, rel=1e-6)
    assert steep.error == pytest.approx(flat.error, rel=1e-6)
    assert reading(tracked(slope)).noise == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("batches", [1, 2, 7, LAGS])
def test_batches_that_come_again_are_no_news(batches: int) -> None:
    losses = noise(batches, 1)[torch.arange(400) % batches]
    assert reading(tracked(losses)).noise < 1e-9
    assert reading(tracked(losses + 0.1 * noise(400, 2))).noise < 0.2


def test_a_jump_does_not_pass_for_noise() -> None:
    held = torch.repeat_interleave(noise(8, 4) * 10, 50) + 0.01 * noise(400, 5)
    assert reading(tracked(held)).noise < 0.05


def test_a_constant_has_no_error() -> None:
    found = reading(tracked([2.5] * 50))
    assert (found.value, found.error, found.noise) == (pytest.approx(2.5), 0.0, 0.0)


# --- what they measure -----------------------------------------------------------------------------------------------


def value_of(signal: Signal, observation: Observation) -> float:
    state = signal.init()
    for _ in range(12):
        state = signal.update(state, observation)
    return signal.read(state).value


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_cosines_are_cosines_at_any_scale(seed: int, scale: float) -> None:
    g, other = torch.randn(2, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = float(torch.nn.functional.cosine_similarity(g, other, dim=0))
    g = g * scale
    norm2, other2, dot = float(g @ g), float(other @ other), float(g @ other)
    previous = Observation(norm2=norm2, dot_previous=dot, previous_norm2=other2)
    reference = Observation(norm2=norm2, dot_reference=dot, reference_norm2=other2)
    assert value_of(CosineToPrevious(), previous) == pytest.approx(expected, abs=1e-9)
    assert value_of(CosineToReference(), reference) == pytest.approx(expected, abs=1e-9)


def test_a_gradient_of_zeros_has_no_direction_and_no_stability() -> None:
    nothing = Observation(norm2=0.0, dot_previous=0.0, previous_norm2=1.0, dot_reference=0.0, reference_norm2=1.0)
    for signal in (CosineToPrevious(), CosineToReference(), GradientNormStability()):
        state = signal.init()
        for _ in range(20):
            state = signal.update(state, nothing)
        assert signal.read(state).is_missing


def test_what_lies_beyond_a_cosine_is_clipped() -> None:
    assert value_of(Agreement(), Observation(agreement=7.0)) == 1.0
    assert value_of(CosineToPrevious(), Observation(norm2=1.0, dot_previous=-9.0, previous_norm2=1.0)) == -1.0


@given(st.floats(1e-9, 1e9))
def test_the_stability_of_norms_has_no_scale(scale: float) -> None:
    signal = GradientNormStability(decay=0.9)
    first, second = signal.init(), signal.init()
    for step in range(30):
        norm = 1.0 + 0.5 * (step % 2)
        first = signal.update(first, Observation(norm2=norm**2))
        second = signal.update(second, Observation(norm2=(norm * scale) ** 2))
    assert signal.read(first).value == pytest.approx(log(1.5))
    assert signal.read(second).value == pytest.approx(log(1.5))


# --- on the wire -----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(width=32), min_size=5, max_size=5), min_size=1, max_size=4))
def test_hostile_numbers_are_refused_one_by_one(rows: list[list[float]]) -> None:
    for read in Reading.unpack(torch.tensor(rows, dtype=torch.float32)):
        assert all(abs(x) < inf for x in (read.value, read.error, read.noise))
        assert read.valid or read in (Reading.missing(), Reading.broken())


@pytest.mark.parametrize(
    "row",
    [
        [nan, 0, 0, 5, 1], [1, -0.1, 0, 5, 1], [1, 0, -1, 5, 1], [1, 0, inf, 5, 1], [1, 0, 0, -3, 1], [1, 0, 0, nan, 0],
        [1, 0, 0, 5, 2], [1, 0, 0, 1e300, 1], [inf, 0, 0, 0, 0],
    ],
)  # fmt: skip
def test_what_pack_never_writes_is_broken(row: list[float]) -> None:
    assert Reading.unpack(torch.tensor([row], dtype=torch.float64))[0].is_broken


def test_readings_of_another_shape_are_misuse() -> None:
    with pytest.raises(MisuseError, match="readings"):
        Reading.unpack(torch.zeros(5))
    with pytest.raises(MisuseError, match="readings"):
        Reading.unpack(torch.zeros(2, 4))
    assert Reading.unpack(Reading.pack(())) == ()

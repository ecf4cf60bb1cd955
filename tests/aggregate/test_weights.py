"""Weights: equal unless there is evidence, within bounds whatever comes, and no reward for what is too good."""

from __future__ import annotations

import copy
import io
from itertools import pairwise
from math import inf, nan

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.aggregate.simulation import Followed, losses, noise, weights_of
from thinwire.aggregate import (
    SIGNALS,
    Agreement,
    GradientNormStability,
    LossEMA,
    Observation,
    Reading,
    SignalWeighted,
    Uniform,
    Weighting,
)
from thinwire.aggregate.bounds import fill
from thinwire.errors import MisuseError
from thinwire.testing.laws import same
from thinwire.testing.signals import usual

PROMPT = SignalWeighted(LossEMA(), smoothing=0.0)


def loss(value: float, error: float = 0.01, noise: float = 0.1, count: int = 500) -> tuple[Reading, ...]:
    return (Reading(value, error, noise, count),)


def weigh(weighting: Weighting, readings: list[tuple[Reading, ...]], tokens: list[float] | None = None) -> list[float]:
    weights, _ = weighting.weights(readings, tokens, weighting.init(len(readings)))
    assert weights.dtype == torch.float64
    return [float(weight) for weight in weights]


_readings = st.builds(
    lambda row: Reading.unpack(torch.tensor([row], dtype=torch.float64)),
    st.tuples(
        st.floats(-1e3, 1e3) | st.sampled_from([nan, inf, 1e300, 0.0]),
        st.floats(0, 10) | st.sampled_from([0.0, 5e-324, nan]),
        st.floats(0, 10) | st.just(0.0),
        st.sampled_from([0.0, 1.0, 50.0, 200.0, 1e6]),
        st.sampled_from([1.0, 1.0, 1.0, 0.0]),
    ),
)
_tokens = st.floats(0, 1e6) | st.sampled_from([0.0, nan, inf, -1.0, 1e308, 5e-324])


# --- laws ------------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 9), st.sampled_from([0.0, 0.02, 0.1]), st.sampled_from([1.0, 0.5, 0.2]))
def test_weights_are_weights_whatever_comes(data: st.DataObject, size: int, floor: float, ceiling: float) -> None:
    ceiling = max(ceiling, 1 / size)
    weighting = SignalWeighted((LossEMA(), Agreement()), floor=floor, ceiling=ceiling, smoothing=0.5)
    state = weighting.init(size)
    for _ in range(4):
        readings = [data.draw(_readings) + data.draw(_readings) for _ in range(size)]
        tokens = data.draw(st.none() | st.lists(_tokens, min_size=size, max_size=size))
        weights, state = weighting.weights(readings, tokens, state)
        assert abs(float(weights.sum()) - 1) < 1e-12
        assert bool((weights >= floor - 1e-12).all())
        assert bool((weights <= ceiling + 1e-12).all())
        assert all(0 <= penalty < inf for penalty in state["penalty"])


@given(st.data(), st.integers(2, 8))
def test_the_order_of_the_workers_does_not_matter(data: st.DataObject, size: int) -> None:
    readings = [data.draw(_readings) for _ in range(size)]
    tokens = data.draw(st.none() | st.lists(st.floats(1, 100), min_size=size, max_size=size))
    order = data.draw(st.permutations(range(size)))
    plain = weigh(PROMPT, readings, tokens)
    moved = weigh(PROMPT, [readings[i] for i in order], tokens and [tokens[i] for i in order])
    assert moved == pytest.approx([plain[i] for i in order], abs=1e-12)


@given(_readings, st.integers(1, 12))
def test_equal_readings_have_exactly_equal_weights(reading: tuple[Reading, ...], size: int) -> None:
    assert weigh(PROMPT, [reading] * size) == [1 / size] * size


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("gap", [1e-6, 0.01, 0.03])
def test_what_chance_explains_changes_nothing(size: int, gap: float) -> None:
    """A z-score over two workers would be 0.88 against 0.12 for the first gap as for the last."""
    assert weigh(PROMPT, [loss(2.5 + gap * (i % 2)) for i in range(size)]) == [1 / size] * size


def test_what_does_not_matter_changes_nothing_however_sure() -> None:
    assert weigh(PROMPT, [loss(2.500, error=1e-9), loss(2.501, error=1e-9)]) == [0.5, 0.5]
    assert weigh(PROMPT, [loss(2.500, error=1e-9), loss(2.600, error=1e-9)])[1] < 1e-9


@given(st.floats(1e-3, 1e3), st.floats(0, 3))
def test_losses_have_no_unit(scale: float, gap: float) -> None:
    plain = [loss(2.0), loss(2.02), loss(2.0 + gap)]
    scaled = [loss(r.value * scale, r.error * scale, r.noise * scale) for (r,) in plain]
    assert weigh(PROMPT, scaled) == pytest.approx(weigh(PROMPT, plain), abs=1e-6)


def test_the_worse_the_less_and_never_more() -> None:
    weights = [weigh(PROMPT, [loss(2.5), loss(2.5), loss(2.5 + gap)])[2] for gap in np.linspace(-1, 1, 80)]
    assert all(later <= earlier for earlier, later in pairwise(weights))
    assert weights[0] == 1 / 3
    assert weights[-1] < 1e-6


def test_high_may_be_better() -> None:
    weighting = SignalWeighted(Agreement(), smoothing=0.0)
    assert weigh(weighting, [loss(0.6), loss(0.6), loss(0.1)])[2] < 1e-6
    assert weigh(weighting, [loss(0.1), loss(0.1), loss(0.6)]) == [1 / 3] * 3


def test_penalties_add() -> None:
    both = SignalWeighted((LossEMA(), Agreement()), smoothing=0.0)
    good, slow, odd = loss(2.5) + loss(0.6), loss(2.6) + loss(0.6), loss(2.6) + loss(0.52)
    weights = weigh(both, [good, good, good, slow])
    assert weights[3] < weights[0]
    ratio = weights[3] / weights[0]
    again = weigh(both, [good, good, good, odd])
    assert 0 < again[3] / again[0] < ratio


# --- tokens and bounds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [PROMPT, Uniform()], ids=["signals", "uniform"])
def test_equal_quality_is_the_mean_over_tokens(weighting: SignalWeighted | Uniform) -> None:
    readings = [loss(2.5) if weighting.signals else () for _ in range(3)]
    assert weigh(weighting, readings, [100.0, 300.0, 600.0]) == pytest.approx([0.1, 0.3, 0.6])
    assert weigh(weighting, readings, [100.0, nan, 300.0]) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert weigh(weighting, readings, [100.0, -5.0, 300.0]) == pytest.approx([0.25, 0.0, 0.75])
    assert weigh(weighting, readings, [0.0, 0.0, 0.0]) == [1 / 3] * 3
    assert weigh(weighting, readings) == [1 / 3] * 3


def test_few_tokens_make_a_noisy_loss_but_no_suspect() -> None:
    """A batch 16 times as large has a fourth of the noise, honestly."""
    large, small = loss(2.4, noise=0.02), loss(2.6, noise=0.09)
    assert weigh(PROMPT, [large, small]) == [0.5, 0.5], "without tokens it looks like a batch that is repeated"
    assert weigh(PROMPT, [large, small], [1600.0, 100.0])[1] < 0.01


@given(st.integers(1, 10), st.data())
def test_filling_holds_the_bounds_and_keeps_proportions(size: int, data: st.DataObject) -> None:
    merit = np.array(data.draw(st.lists(st.floats(0, 1) | st.just(0.0), min_size=size, max_size=size)))
    low = np.full(size, data.draw(st.floats(0, 1 / size)))
    high = np.full(size, data.draw(st.floats(1 / size, 1)))
    weights = fill(merit, np.full(size, 1 / size), low, high)
    assert abs(weights.sum() - 1) < 1e-12
    assert (weights >= low - 1e-12).all()
    assert (weights <= high + 1e-12).all()
    free = (merit > 1e-9) & (weights > low + 1e-9) & (weights < high - 1e-9)
    if free.any():
        rates = weights[free] / merit[free]
        assert rates.max() <= rates.min() * (1 + 1e-6)


def test_floor_and_ceiling_hold_in_the_end() -> None:
    bounded = SignalWeighted(LossEMA(), floor=0.05, ceiling=0.4, smoothing=0.0)
    weights = weigh(bounded, [loss(2.5), loss(2.5), loss(9.0), loss(9.0)])
    assert weights == pytest.approx([0.4, 0.4, 0.1, 0.1])
    bounded = SignalWeighted(LossEMA(), floor=0.05, smoothing=0.0)
    assert weigh(bounded, [loss(2.5), loss(2.5), loss(9.0)]) == pytest.approx([0.475, 0.475, 0.05])


@pytest.mark.parametrize(
    "options",
    [
        {"floor": 0.6}, {"ceiling": 0.4}, {"floor": -0.1}, {"floor": 0.5, "ceiling": 0.4}, {"ceiling": 1.1},
        {"significance": -1}, {"significance": nan}, {"tolerance": -1}, {"temperature": 0}, {"smoothing": 1.0},
        {"warmup": -1}, {"freeze_after": -1},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_hold_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(MisuseError):
        SignalWeighted(LossEMA(), **options).init(2)


def test_misuse_is_named() -> None:
    with pytest.raises(MisuseError, match="no signals"):
        SignalWeighted(())
    with pytest.raises(MisuseError, match="resized"):
        PROMPT.weights([loss(1)], None, PROMPT.init(2))
    with pytest.raises(MisuseError, match="workers"):
        PROMPT.weights([loss(1)] * 2, [1.0], PROMPT.init(2))
    with pytest.raises(MisuseError, match="readings"):
        PROMPT.weights([loss(1), ()], None, PROMPT.init(2))
    for weighting in (PROMPT, Uniform()):
        with pytest.raises(MisuseError, match="at least one"):
            weighting.init(0)


# --- what is missing, broken, constant, alone ------------------------------------------------------------------------


def test_a_worker_that_reports_nan_is_at_the_floor_at_once() -> None:
    weighting = SignalWeighted(LossEMA(), floor=0.01, smoothing=0.99)
    state = weighting.init(3)
    weights, state = weighting.weights([loss(2.5), loss(2.5), (Reading.broken(),)], None, state)
    assert weights.tolist() == pytest.approx([0.495, 0.495, 0.01])
    weights, state = weighting.weights([loss(2.5)] * 3, None, state)
    assert weights.tolist() == [1 / 3] * 3
    assert weigh(weighting, [(Reading.broken(),)] * 3) == [1 / 3] * 3, "nobody is better"


def test_a_worker_that_reports_nothing_is_neutral() -> None:
    assert weigh(PROMPT, [loss(2.5), loss(2.5), (Reading.missing(),)]) == [1 / 3] * 3
    weights = weigh(PROMPT, [loss(2.5), loss(2.5), loss(5.0), (Reading.missing(),)])
    assert weights == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=1e-6)


def test_alone_the_weight_is_one() -> None:
    for reading in (loss(2.5), (Reading.broken(),), (Reading.missing(),)):
        assert weigh(PROMPT, [reading]) == [1.0]


def test_constants_divide_nothing_by_zero() -> None:
    constant = [loss(2.5, error=0.0, noise=0.0), loss(2.5, error=0.0, noise=0.0)]
    assert weigh(PROMPT, constant) == [0.5, 0.5]
    assert weigh(PROMPT, [constant[0], loss(3.0, error=0.0, noise=0.0)]) == pytest.approx([1.0, 0.0], abs=1e-12)


# --- over time -------------------------------------------------------------------------------------------------------


def test_warm_up_smoothing_and_freezing() -> None:
    weighting = SignalWeighted(LossEMA(), warmup=100, smoothing=0.5, freeze_after=4)
    state = weighting.init(2)
    weights, state = weighting.weights([loss(2.5, count=99), loss(5, count=500)], None, state)
    assert weights.tolist() == [0.5, 0.5], "neither judged, nor a reference"
    seen = []
    for _ in range(3):
        weights, state = weighting.weights([loss(2.5), loss(2.62)], None, state)
        seen.append(float(weights[1]))
    assert 0.5 > seen[0] > seen[1] > seen[2] > 0
    weights, state = weighting.weights([loss(2.5), loss(2.5)], None, state)
    assert float(weights[1]) == seen[2], "frozen"


def test_a_worker_that_recovers_comes_back_to_exactly_its_share() -> None:
    weighting = SignalWeighted(LossEMA())
    state = weighting.init(2)
    for _ in range(300):
        _, state = weighting.weights([loss(2.5), loss(9.0)], None, state)
    for step in range(400):
        weights, state = weighting.weights([loss(2.5), loss(2.5)], None, state)
        assert step != 100 or float(weights[1]) > 0.49
    assert weights.tolist() == [0.5, 0.5]


def test_states_are_saved_and_not_mutated() -> None:
    weighting = SignalWeighted((LossEMA(), GradientNormStability()))
    state = weighting.init(3)
    for step in range(5):
        before = copy.deepcopy(state)
        readings = [loss(2.5) + loss(0.1), loss(2.5 + step) + loss(0.1), loss(2.0, noise=0.001) + loss(0.1)]
        weights, after = weighting.weights(readings, None, state)
        assert same(state, before)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        again, loaded = weighting.weights(readings, None, torch.load(file, weights_only=True))
        assert torch.equal(again, weights)
        assert same(loaded, after)
        state = after
    assert repr(copy.deepcopy(weighting)) == repr(weighting)
    assert " at 0x" not in repr(weighting)


def test_who_stays_keeps_his_standing_when_the_group_changes() -> None:
    state = PROMPT.init(3)
    _, state = PROMPT.weights([loss(2.5), loss(2.5), loss(2.6)], None, state)
    resized = PROMPT.resized(state, [2, None, 0, 1])
    assert resized["penalty"] == [state["penalty"][2], 0.0, state["penalty"][0], state["penalty"][1]]
    weights, _ = PROMPT.weights([loss(2.6), (Reading.missing(),), loss(2.5), loss(2.5)], None, resized)
    assert abs(float(weights.sum()) - 1) < 1e-12
    assert weights[0] < weights[1] == weights[2]
    with pytest.raises(MisuseError, match="among"):
        PROMPT.resized(state, [3])
    assert Uniform().resized(Uniform().init(3), [0, None]) == Uniform().init(2)


# --- too good to be true ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_low_loss_without_noise_earns_nothing(size: int) -> None:
    workers = [loss(2.5)] * (size - 1) + [loss(0.7, noise=0.003)]
    assert weigh(PROMPT, workers) == [1 / size] * size
    assert (
        weigh(SignalWeighted(LossEMA(), smoothing=0.0, suspicion=False), [loss(2.5), loss(0.7, noise=0.003)])[0] < 1e-6
    )


def test_it_does_not_profit_from_a_bad_one_either() -> None:
    weights = weigh(PROMPT, [loss(2.5), loss(2.5), loss(6.0), loss(0.7, noise=0.003)])
    assert weights == pytest.approx([0.375, 0.375, 0.0, 0.25], abs=1e-6)


def test_a_bad_one_with_little_noise_is_bad() -> None:
    """All tokens replaced: the loss stays near the entropy of single tokens, and hardly moves."""
    assert weigh(PROMPT, [loss(3.0, noise=0.1), loss(7.5, noise=0.01)])[1] < 1e-6


def test_a_good_loss_that_is_small_and_quiet_is_no_suspect() -> None:
    """As in classification: near zero, the noise is small, but not relative to the loss."""
    assert weigh(PROMPT, [loss(0.05, noise=0.05), loss(2.5, noise=0.3)])[1] < 1e-6


def test_suspicion_lasts_until_the_noise_is_plausible_both_ways() -> None:
    """Learnt by heart, the loss is so small that its noise is no longer small relative to it."""
    state = PROMPT.init(2)
    for value, noise_, suspected in [(1.0, 0.003, True), (0.01, 0.003, True), (2.4, 0.1, False), (0.01, 0.003, False)]:
        weights, state = PROMPT.weights([loss(2.5), loss(value, noise=noise_)], None, state)
        assert state["suspected"] == [[False, suspected]]
        if suspected:
            assert weights.tolist() == [0.5, 0.5]


# --- simulated runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_a_clean_run_loses_no_workers(workers: int) -> None:
    weights = weights_of(losses(1200, workers, seed=workers), SignalWeighted(LossEMA()))
    assert (1 / (weights**2).sum(1)).mean() >= 0.98 * workers


@pytest.mark.parametrize("workers", [2, 5])
def test_a_clean_run_loses_no_workers_by_all_signals_together(workers: int) -> None:
    run = Followed(SignalWeighted(tuple(signal() for signal in SIGNALS.values())), workers)
    weights = torch.stack([run.step([usual(step, seed) for seed in range(workers)]) for step in range(400)])
    assert float((1 / weights.square().sum(1)).mean()) >= 0.98 * workers


@pytest.mark.slow
@pytest.mark.parametrize("autocorrelation", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("workers", [2, 4, 8])
def test_a_long_clean_run_loses_no_workers(workers: int, autocorrelation: float) -> None:
    for seed in range(2):
        weights = weights_of(losses(5000, workers, seed, autocorrelation), SignalWeighted(LossEMA()))
        effective = 1 / (weights**2).sum(1)
        assert effective.mean() >= 0.98 * workers
        assert effective.min() >= 0.9 * workers


@pytest.mark.parametrize(("workers", "bad"), [(2, 1), (8, 2)])
def test_a_raised_loss_costs_weight_from_the_end_of_the_warm_up_on(workers: int, bad: int) -> None:
    values = losses(700, workers, seed=3)
    values[:, workers - bad :] *= 1.4
    weights = weights_of(values, SignalWeighted(LossEMA(), warmup=100))
    assert (weights[:99] == 1 / workers).all()
    assert (weights[150:, : workers - bad] > 1 / workers).all()
    assert weights[-1, workers - bad :].max() < 1e-3


def test_a_loss_that_is_raised_late_is_seen_soon() -> None:
    values = 2.5 + 0.06 * noise(900, 2, seed=1)
    values[500:, 1] += 0.3
    weights = weights_of(values, SignalWeighted(LossEMA()))
    assert (weights[:500] == 0.5).mean() > 0.98
    assert weights[640:, 1].max() < 0.1
    assert weights[-1, 1] < 0.01


def test_a_worker_that_leaves_and_comes_back_is_neutral_until_it_is_known() -> None:
    run = Followed(SignalWeighted(LossEMA()), 3)
    values = losses(600, 3, seed=2)
    for row in values[:300]:
        run.step([Observation(loss=float(x)) for x in row])
    run.shared = run.weighting.resized(run.shared, [0, 1, None])
    run.states[2] = [signal.init() for signal in run.weighting.signals]
    for row in values[300:]:
        weights = run.step([Observation(loss=float(x)) for x in row])
        assert weights.tolist() == pytest.approx([1 / 3] * 3, abs=0.01)


# --- noise as evidence -----------------------------------------------------------------------------------------------


def _told(value: float, noise: float) -> tuple[Reading, ...]:
    return (Reading(value=value, error=noise / 10, noise=noise, count=500),)


def test_the_noise_of_a_convicted_worker_is_no_measure_of_an_honest_one() -> None:
    weighting = SignalWeighted(LossEMA(), smoothing=0.5)
    state = weighting.init(2)
    for spread in (0.1, 0.2, 0.5):  # the model leaves the corrupted one behind
        for _ in range(20):
            weights, state = weighting.weights([_told(2.5, 0.1), _told(4.5, spread)], None, state)
        assert weights[0] > 0.99


def test_the_less_noise_the_better_one_has_the_more_evidence_it_takes() -> None:
    weighting = SignalWeighted(LossEMA(), smoothing=0.0)

    def found(noise: float) -> float:
        told = [(Reading(2.5, 0.01, noise, 500),), (Reading(2.65, 0.01, 0.1, 500),)]
        return float(weighting.weights(told, None, weighting.init(2))[0][0])

    shares = [found(noise) for noise in (0.1, 0.08, 0.065, 0.055)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] == 0.5

"""Schedules: always a density, pure, alike on all ranks, each following what it says it follows."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from math import inf, nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compress.base import State
from thinwire.compress.schedule import Accordion, ByteBudget, Constant, Plateau, Schedule, Signals, Warmup
from thinwire.errors import MisuseError

SCHEDULES: list[Schedule] = [
    Constant(0.02),
    Warmup(0.25, 0.01, steps=10),
    Warmup(0.01, 1.0, steps=7),
    Plateau(window=1),
    Plateau(window=3, factor=1e300, start=0.1, maximum=1.0),
    Accordion(window=1),
    Accordion(window=4, low=0.5, high=0.5),
    ByteBudget(Warmup(steps=5), total_bytes=10_000, steps=20, numel=3000),
    ByteBudget(Plateau(window=1), total_bytes=200, steps=20, numel=3000, burst=1.0),
]

numbers = st.none() | st.floats() | st.floats(0, 10) | st.sampled_from([0.0, -0.0, nan, inf, -inf, 1.7e308, 5e-324])
histories = st.lists(st.tuples(numbers, numbers), max_size=40)


def run(schedule: Schedule, signals: list[Signals]) -> list[float]:
    """The densities of all steps, the first included."""
    state = schedule.init()
    densities = [schedule.density(state)]
    for signal in signals:
        state = schedule.observe(state, signal)
        densities.append(schedule.density(state))
    return densities


def of_losses(schedule: Schedule, losses: list[float]) -> list[float]:
    return run(schedule, [Signals(step, loss=loss) for step, loss in enumerate(losses)])


def of_norms(schedule: Schedule, norms: list[float]) -> list[float]:
    return run(schedule, [Signals(step, gradient_norm=norm) for step, norm in enumerate(norms)])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_any_history_gives_a_density_and_leaves_states_alone(schedule: Schedule) -> None:
    @given(histories)
    def law(history: list[tuple[float | None, float | None]]) -> None:
        state = schedule.init()
        for step, (loss, norm) in enumerate(history):
            before = copy.deepcopy(state)
            signals = Signals(step, loss, norm)
            after = schedule.observe(state, signals)
            assert repr(state) == repr(before)
            assert repr(schedule.observe(state, signals)) == repr(after), "the same input gave another state"
            assert 0 < schedule.density(after) <= 1
            state = after
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        assert repr(torch.load(file, weights_only=True)) == repr(state)

    law()


# --- warm-up ----------------------------------------------------------------------------------------------------------


def test_warmup_falls_by_the_same_factor_each_step_and_then_stays() -> None:
    densities = run(Warmup(start=0.25, end=0.001, steps=50), [Signals(step) for step in range(60)])
    assert densities[0] == 0.25
    assert densities[50:] == [0.001] * 11
    ratios = [later / earlier for earlier, later in pairwise(densities[:51])]
    assert ratios == pytest.approx([(0.001 / 0.25) ** (1 / 50)] * 50)


def test_warmup_passes_the_densities_of_the_paper() -> None:
    """Lin et al. 2018, section 3.3: sparsity 75 %, 93.75 %, 98.4375 %, 99.6 % epoch by epoch."""
    epoch = 100
    densities = run(Warmup(start=0.25, end=0.25**5, steps=4 * epoch), [Signals(step) for step in range(4 * epoch)])
    assert densities[::epoch] == pytest.approx([0.25, 0.0625, 0.015625, 0.00390625, 0.0009765625])


def test_warmup_goes_by_the_step_and_not_by_the_calls() -> None:
    schedule = Warmup(start=0.4, end=0.1, steps=10)
    assert schedule.density(schedule.observe(schedule.init(), Signals(4))) == pytest.approx(0.2)


# --- plateau ----------------------------------------------------------------------------------------------------------

PLATEAU = Plateau(start=0.01, minimum=0.001, maximum=0.08, window=5, factor=2.0, slow=0.01, fast=0.05)


def test_a_loss_that_stands_still_raises_the_density_to_its_maximum() -> None:
    densities = of_losses(PLATEAU, [3.0] * 50)
    assert densities[::5] == [0.01, 0.01, 0.02, 0.04, 0.08, 0.08, 0.08, 0.08, 0.08, 0.08, 0.08]
    assert densities[6:10] == [0.01] * 4, "within a window nothing changes"


def test_a_loss_that_falls_fast_lowers_it_to_its_minimum() -> None:
    densities = of_losses(PLATEAU, [0.95**step for step in range(50)])
    assert densities[10::5] == pytest.approx([0.005, 0.0025, 0.00125] + [0.001] * 6)


def test_a_loss_that_falls_as_it_should_leaves_it() -> None:
    assert set(of_losses(PLATEAU, [0.995**step for step in range(50)])) == {0.01}


def test_a_loss_that_rises_raises_the_density() -> None:
    assert of_losses(PLATEAU, [1.1**step for step in range(20)])[-1] == 0.08
    assert of_losses(PLATEAU, [-5.0 + step for step in range(20)])[-1] == 0.08  # a negative one too


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_divergence_takes_the_maximum_at_once_and_begins_anew(bad: float) -> None:
    densities = of_losses(PLATEAU, [0.9**step for step in range(20)] + [bad] + [0.9**step for step in range(20)])
    assert densities[20] < 0.01
    assert densities[21:31] == [0.08] * 10
    assert densities[31] == 0.04, "two whole windows after it, the loss counts again"


def test_steps_without_a_loss_do_not_count() -> None:
    signals = [Signals(step, loss=3.0 if step % 3 == 0 else None) for step in range(150)]
    assert run(PLATEAU, signals)[-1] == of_losses(PLATEAU, [3.0] * 50)[-1]
    assert set(run(PLATEAU, [Signals(step) for step in range(50)])) == {0.01}


# --- accordion --------------------------------------------------------------------------------------------------------

ACCORDION = Accordion(low=0.01, high=0.1, window=4, eta=0.5)


def test_a_regime_is_critical_until_two_windows_agree() -> None:
    densities = of_norms(ACCORDION, [2.0] * 12)
    assert densities == [0.1] * 8 + [0.01] * 5


def test_a_change_of_the_norm_by_eta_is_critical_either_way() -> None:
    steady = [2.0] * 8
    assert of_norms(ACCORDION, steady + [1.0] * 4)[-1] == 0.1
    assert of_norms(ACCORDION, steady + [1.1] * 4)[-1] == 0.01
    assert of_norms(ACCORDION, steady + [3.0] * 4)[-1] == 0.1
    assert of_norms(ACCORDION, steady + [2.9] * 4)[-1] == 0.01
    assert of_norms(ACCORDION, steady + [3.0] * 8)[-1] == 0.01
    assert of_norms(ACCORDION, [0.0] * 8)[-1] == 0.01
    assert of_norms(ACCORDION, [0.0] * 8 + [1.0] * 4)[-1] == 0.1


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_norm_that_is_not_finite_is_critical(bad: float) -> None:
    densities = of_norms(ACCORDION, [2.0] * 10 + [bad] + [2.0] * 8)
    assert densities[10] == 0.01
    assert densities[11:19] == [0.1] * 8
    assert densities[19] == 0.01


# --- bytes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed(Schedule):
    """The densities of a list, one after another."""

    densities: tuple[float, ...] = field(repr=False)

    def init(self) -> State:
        return {"at": 0}

    def observe(self, state: State, signals: Signals) -> State:
        return {"at": state["at"] + 1}

    def density(self, state: State) -> float:
        return self.densities[state["at"] % len(self.densities)]


def planned(budget: ByteBudget) -> list[int]:
    """Entries of each of its steps."""
    densities = run(budget, [Signals(step) for step in range(budget.steps - 1)])
    return [max(1, min(budget.numel, round(density * budget.numel))) for density in densities]


budgets = st.builds(
    lambda densities, steps, numel, entry, spare, burst: ByteBudget(
        Listed(tuple(densities)), int(steps * entry) + 1 + spare, steps, numel, entry, burst
    ),
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20),
    st.integers(1, 60),
    st.integers(1, 2**31 - 1),
    st.floats(0.1, 20),
    st.integers(0, 10**6) | st.integers(0, 100),
    st.floats(1, 100),
)


@given(budgets)
def test_the_plan_never_exceeds_the_budget(budget: ByteBudget) -> None:
    entries = planned(budget)
    assert min(entries) >= 1
    assert sum(entries) * Fraction(budget.bytes_per_entry) <= budget.total_bytes


@given(budgets)
def test_no_step_gets_more_than_it_wants(budget: ByteBudget) -> None:
    wanted = budget.schedule.densities  # type: ignore[attr-defined]
    for step, entries in enumerate(planned(budget)):
        assert entries <= max(1, round(wanted[step % len(wanted)] * budget.numel))


@given(st.integers(1, 60), st.integers(0, 10**6), st.floats(1, 100))
def test_who_wants_all_spends_all(steps: int, spare: int, burst: float) -> None:
    budget = ByteBudget(Constant(1.0), 4 * steps + spare, steps, 2**31 - 1, 4.0, burst)
    assert sum(planned(budget)) == (4 * steps + spare) // 4


def test_a_budget_that_suffices_changes_nothing() -> None:
    wanted = Warmup(start=0.25, end=0.01, steps=10)
    budget = ByteBudget(wanted, total_bytes=10**9, steps=40, numel=10_000)
    alone = run(wanted, [Signals(step) for step in range(39)])
    assert planned(budget) == [round(density * 10_000) for density in alone]


def test_what_a_thrifty_step_leaves_goes_to_later_ones() -> None:
    budget = ByteBudget(Listed((0.001, 0.001, 1.0, 1.0)), 4000, steps=4, numel=10_000, bytes_per_entry=1.0, burst=1.0)
    assert planned(budget) == [10, 10, 1990, 1990]


def test_after_the_last_step_one_entry_is_sent() -> None:
    budget = ByteBudget(Constant(0.5), 1000, steps=3, numel=1000)
    assert run(budget, [Signals(step) for step in range(5)])[3:] == [0.001] * 3


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [lambda: Constant(0.0), lambda: Constant(1.1), lambda: Warmup(start=0), lambda: Warmup(end=2),
     lambda: Warmup(steps=0), lambda: Plateau(start=0.5), lambda: Plateau(minimum=0), lambda: Plateau(factor=1.0),
     lambda: Plateau(window=0), lambda: Plateau(slow=0.1), lambda: Plateau(factor=nan), lambda: Accordion(low=0),
     lambda: Accordion(eta=0), lambda: Accordion(eta=nan), lambda: Accordion(window=0),
     lambda: ByteBudget(Constant(), 99, 20, 100, 5.0), lambda: ByteBudget(Constant(), 99, 0, 100),
     lambda: ByteBudget(Constant(), 99, 1, 0), lambda: ByteBudget(Constant(), 99, 1, 10, 0.0),
     lambda: ByteBudget(Constant(), 99, 1, 10, burst=0.5)],
)  # fmt: skip
def test_impossible_schedules_are_refused(wrong: Any) -> None:
    with pytest.raises(MisuseError):
        wrong()

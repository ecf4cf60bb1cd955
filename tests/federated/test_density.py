"""Schedules, budgets, bandwidths, and the ledger that they are kept by."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compress.schedule import Signals
from thinwire.errors import MisuseError
from thinwire.federated.density import Adaptive, Bandwidths, affordable
from thinwire.federated.ledger import Ledger

losses = st.lists(st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)), max_size=40)


@given(losses)
def test_the_density_stays_within_its_bounds_whatever_the_loss(values):
    schedule = Adaptive(patience=2)
    state = schedule.init()
    for step, loss in enumerate(values):
        before = dict(state)
        after = schedule.observe(state, Signals(step, loss=loss))
        assert state == before
        state = after
        assert schedule.minimum <= schedule.density(state) <= schedule.maximum


def densities(schedule, values):
    state, seen = schedule.init(), []
    for step, loss in enumerate(values):
        state = schedule.observe(state, Signals(step, loss=loss))
        seen.append(schedule.density(state))
    return seen


def test_plateaus_raise_and_divergence_lowers():
    schedule = Adaptive(start=0.01, minimum=0.005, maximum=0.04, patience=2)
    assert densities(schedule, [1.0] * 7) == [0.01, 0.01, 0.02, 0.02, 0.04, 0.04, 0.04]
    assert densities(schedule, [1.0, 0.9, 0.8, 0.7]) == [0.01] * 4
    assert densities(schedule, [1.0, 2.0, math.nan, math.inf]) == [0.01, 0.005, 0.005, 0.005]
    for wrong in ({"minimum": 0.5}, {"patience": 0}, {"factor": 1.0}, {"divergence": 1.0}, {"improvement": 1.0}):
        with pytest.raises(MisuseError):
            Adaptive(**wrong)


@given(
    st.floats(0, 1e9), st.integers(1, 100), st.integers(1, 100), st.integers(1, 10**7), st.floats(0, 1e4),
    st.floats(0.5, 6),
)  # fmt: skip
def test_an_affordable_density_keeps_to_the_budget(left, rounds, clients, numel, fixed, per_entry):
    density = affordable(left, rounds, clients=clients, numel=numel, fixed=fixed, per_entry=per_entry)
    assert 0 < density <= 1
    if density > 1 / numel:
        assert rounds * clients * (fixed + density * numel * per_entry) <= left * (1 + 1e-9)
    assert affordable(left, 0, clients=clients, numel=numel, fixed=fixed, per_entry=per_entry) == 1 / numel


def test_slow_links_get_less():
    limits = Bandwidths({1: 300.0, 2: 1e9, 3: 1e-9}, seconds=1.0, per_entry=3.0)
    assert [limits.density(node, 0.5, numel=1000) for node in (1, 2, 3, 4)] == [0.1, 0.5, 0.001, 0.5]
    for wrong in ({"seconds": 0.0}, {"bytes_per_second": {1: 0.0}}, {"per_entry": -1.0}):
        with pytest.raises(MisuseError):
            Bandwidths(**wrong)


def test_a_ledger_adds_up():
    ledger = Ledger()
    for round_ in (1, 2):
        for node in (7, 8):
            ledger.add(round_, "client", "up", node=node, kind="update", nbytes=round_ * node)
    assert ledger.total() == 45
    assert ledger.total(round=2) == 30
    assert ledger.by("node", round=1) == {(7,): 7, (8,): 8}

"""Workers train a small model with the weights: whoever is corrupted loses, whoever repeats batches gains nothing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.aggregate.simulation import Data, train
from thinwire.aggregate import LossEMA, SignalWeighted

CLEAN = Data()
EVERY = [pytest.param(True, id="adam"), pytest.param(False, id="sgd")]


@pytest.mark.parametrize("garbled", [0.3, 1.0])
def test_the_clean_one_of_two_gains(garbled: float) -> None:
    weights = train([CLEAN, Data(garbled=garbled)], SignalWeighted(LossEMA()), steps=220)
    assert (weights[110:, 0] > 0.5).all()
    assert weights[-1, 0] > 0.99


@pytest.mark.parametrize("repeated", [1, 5])
def test_one_of_two_that_repeats_batches_never_gains(repeated: int) -> None:
    weights = train([CLEAN, Data(repeated=repeated)], SignalWeighted(LossEMA()), steps=250)
    assert weights[:, 1].max() <= 0.5


def test_without_suspicion_it_would() -> None:
    """So the test above is one."""
    weights = train([CLEAN, Data(repeated=1)], SignalWeighted(LossEMA(), suspicion=False), steps=250)
    assert weights[-1, 1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("adam", EVERY)
@pytest.mark.parametrize(
    "data",
    [
        Data(repeated=1), Data(repeated=2), Data(repeated=5), Data(repeated=20), Data(repeated=30), Data(held=30),
        Data(held=100), Data(repeated=1, since=400), Data(repeated=5, since=400),
    ],
    ids=repr,
)  # fmt: skip
def test_no_way_of_repeating_batches_pays(data: Data, adam: bool) -> None:
    weights = train([CLEAN, data], SignalWeighted(LossEMA()), steps=800, adam=adam, seed=1)
    assert weights[:, 1].max() <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("adam", EVERY)
def test_a_larger_group_with_one_of_each_kind(adam: bool) -> None:
    shards = [CLEAN, CLEAN, CLEAN, Data(garbled=0.3), Data(repeated=1)]
    weights = train(shards, SignalWeighted(LossEMA()), steps=600, adam=adam)
    assert weights[:, 4].max() <= 0.2
    assert (weights[150:, :3] > 0.2).all()
    assert weights[-1, 3] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("adam", EVERY)
def test_two_clean_ones_stay_equal(adam: bool) -> None:
    weights = train([CLEAN, CLEAN], SignalWeighted(LossEMA()), steps=900, adam=adam)
    assert np.mean(1 / (weights**2).sum(1)) > 1.99

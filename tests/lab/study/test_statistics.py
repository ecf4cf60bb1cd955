"""Intervals cover what they should, and tests hold their level."""

from __future__ import annotations

import numpy as np
import pytest

from thinwire.errors import MisuseError
from thinwire.lab.study.statistics import correlation, friedman, mean_of


@pytest.mark.parametrize("count", [2, 5, 40])
def test_an_interval_covers_the_mean_19_times_in_20(count: int) -> None:
    source = np.random.default_rng(count)
    found = [mean_of(source.normal(3.0, 2.0, count).tolist()) for _ in range(4000)]
    covered = sum(e.low <= 3.0 <= e.high for e in found) / 4000
    assert abs(covered - 0.95) < 0.014  # four standard errors


def test_a_mean_of_one_value_says_nothing_of_its_error() -> None:
    estimate = mean_of([1.0])
    assert (estimate.value, estimate.sign) == (1.0, 0)
    with pytest.raises(MisuseError):
        mean_of([])


def test_the_sign_is_that_of_the_whole_interval() -> None:
    assert [mean_of(values).sign for values in ([1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, -1.0, 0.5])] == [1, -1, 0]


def test_correlation_is_spearmans() -> None:
    source = np.random.default_rng(0)
    a = source.normal(size=50)
    b = a + source.normal(size=50)
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    estimate = correlation(a.tolist(), b.tolist())
    assert estimate.value == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert estimate.sign == 1
    assert correlation(a.tolist(), source.normal(size=50).tolist()).sign == 0
    assert correlation([1.0] * 5, [1, 2, 3, 4, 5]).value == 0
    with pytest.raises(MisuseError):
        correlation([1.0], [1.0])


def test_friedmans_test_rejects_chance_one_time_in_twenty() -> None:
    source = np.random.default_rng(1)
    found = np.array([friedman(source.normal(size=(5, 4)), resamples=200, seed=i) for i in range(400)])
    assert abs((found <= 0.05).mean() - 0.05) < 0.045
    assert friedman(source.normal(size=(6, 4)) + np.arange(4) * 5, resamples=500) < 0.01

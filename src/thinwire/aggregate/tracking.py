"""Follows one number over steps: its moving average, how far that can be off, and what is new in each step.

**The value** is an exponential moving average (EMA) with decay ``d``, corrected for its start: with ``w_j = d^(t-j)``,
``sum w_j x_j / sum w_j``.

**The noise** must not take a falling loss for noise, nor a batch that comes again for news. So it is read off second
differences ``x_t - 2 x_(t-k) + x_(t-2k)``, at all lags ``k`` from 1 to :data:`LAGS`: they cancel any line, and for
stationary noise with variance ``s²`` and autocorrelation ``r`` their variance is ``s² (6 - 8 r_k + 2 r_2k)``. What is
new in each step is the least of these over the lags: a worker that cycles through ``k`` batches has as good as none at
lag ``k``, one that keeps to a single batch has little at any. (It is taken from means of ``|.|^½`` rather than of
squares, so that neither heavy tails nor a jump to another batch hide it.)

**The standard error** takes the noise at long lags as ``s²``, solves for ``r_k``, and is
``sqrt(s² (1 + 2 sum_k r_k) / n)`` where ``n = (sum w_j)² / sum w_j²`` is the EMA's effective sample size, in the long
run ``(1 + d) / (1 - d)``: 199 steps for 0.99. For noise that stays correlated for more than half of :data:`ERROR_LAGS`
steps the error comes out too small; a curve that bends within them makes it larger, as that of early training does.
"""

from __future__ import annotations

from math import isfinite, nan, sqrt

import torch

from thinwire.aggregate.base import Reading, State

__all__ = ["LAGS", "follow", "follower", "lost", "reading"]

LAGS = 32
"""A cycle of up to so many batches is seen through."""

ERROR_LAGS = 16
"""Lags that the standard error looks at: from half of them on, noise is taken to be uncorrelated."""

MINIMUM = 8
"""Second differences at one lag; fewer say nothing about the noise. So there is no reading before ten observations."""

NEWS_DECAY = 0.97
"""Of what is new in each step: some 65 steps, so that a worker is seen to stop sampling before its average profits."""

ERROR_DECAY = 0.99
"""Of the squares that the error is made from, where the value's own decay is less."""

LARGEST = 1e100
"""What is beyond is taken for infinite: its square must not overflow."""

_ROOT = 0.8222
"""The mean of ``|x|^½`` for a standard normal ``x``: ``2^¼ Γ(¾) / √π``."""


def follower() -> State:
    """The state before the first observation. Its tensors are float64: ``history``, the latest first, and for each lag
    the decayed sums over second differences of their roots and squares, and of the weights of these sums."""
    return {
        "count": 0,
        "sum": 0.0,
        "weight": 0.0,
        "weight2": 0.0,
        "lost": False,
        "history": torch.full((2 * LAGS,), nan, dtype=torch.float64),
        "roots": torch.zeros(LAGS, dtype=torch.float64),
        "roots_seen": torch.zeros(LAGS, dtype=torch.float64),
        "squares": torch.zeros(LAGS, dtype=torch.float64),
        "squares_seen": torch.zeros(LAGS, dtype=torch.float64),
        "finite": 0,
    }


def lost(state: State) -> State:
    """The state after an observation that was not finite: the average goes on from where it was."""
    return {**state, "lost": True, "count": state["count"] + 1}


def follow(state: State, value: float, decay: float) -> State:
    """The state after ``value``."""
    if not isfinite(value) or abs(value) > LARGEST:
        return lost(state)
    values = torch.cat([torch.tensor([value], dtype=torch.float64), state["history"]])
    second = (values[0] - 2 * values[1 : LAGS + 1] + values[2 : 2 * LAGS + 1 : 2]).abs_()
    known = second.isfinite()
    second.masked_fill_(~known, 0.0)
    news, error = (torch.where(known, fading, 1.0) for fading in (NEWS_DECAY, max(decay, ERROR_DECAY)))
    return {
        "count": state["count"] + 1,
        "sum": decay * state["sum"] + value,
        "weight": decay * state["weight"] + 1.0,
        "weight2": decay * decay * state["weight2"] + 1.0,
        "lost": False,
        "history": values[: 2 * LAGS].clone(),
        "roots": state["roots"] * news + second.sqrt(),
        "roots_seen": state["roots_seen"] * news + known,
        "squares": state["squares"] * error + second.square_(),
        "squares_seen": state["squares_seen"] * error + known,
        "finite": state["finite"] + 1,
    }


def reading(state: State) -> Reading:
    if state["lost"]:
        return Reading.broken()
    lags = min(LAGS, (state["finite"] - MINIMUM) // 2)
    if lags < 1:
        return Reading.missing()
    roots, squares = (state[kind][:lags] / state[f"{kind}_seen"][:lags] for kind in ("roots", "squares"))
    effective = state["weight"] ** 2 / state["weight2"]
    error = sqrt(_long_run_variance((squares[:ERROR_LAGS] / 6).tolist()) / effective)
    news = (float(roots.min()) / _ROOT) ** 2 / sqrt(6.0)
    return Reading(state["sum"] / state["weight"], error, news, state["count"])


def _long_run_variance(structure: list[float]) -> float:
    """``s² (1 + 2 sum_k r_k)`` from ``structure[k - 1] = s² (1 - 4/3 r_k + 1/3 r_2k)``, but never below ``s²``."""
    lags = len(structure)
    far = structure[lags // 2 :]
    variance = sum(far) / len(far)
    if variance <= 0:
        return 0.0
    correlation = [0.0] * (lags + 1)
    for lag in range(lags // 2, 0, -1):
        correlation[lag] = 0.75 * (1 - structure[lag - 1] / variance + correlation[2 * lag] / 3)
    total = 0.0
    for lag in range(1, lags // 2 + 1):
        if correlation[lag] < 0.05:  # from here on it is noise; a cycle's later ones do not count either
            break
        total += min(1.0, correlation[lag])
    return variance * (1 + 2 * total)

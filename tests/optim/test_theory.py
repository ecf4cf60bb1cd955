"""Each step of the proof in docs/theory.md, held against ASPG itself, and the theorem's bound against a run."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.optim import ASPG


def feedback(p: torch.nn.Parameter, **options: object) -> ASPG:
    plain = {"lr": 1.0, "style": "sgd", "weight_decay": 0.0, "refresh_every": 1, "error_feedback": True}
    return ASPG([p], **(plain | options))  # type: ignore[arg-type]


def waits(optimizer: ASPG, p: torch.nn.Parameter) -> torch.Tensor:
    found: torch.Tensor = optimizer.state[p]["residual"]
    return found


@settings(max_examples=25)
@given(st.integers(2, 60), st.sampled_from([0.1, 0.4]), st.sampled_from([1.0, 2.0, 5.0]), st.integers(0, 2**32))
def test_a_selection_contracts(n: int, density: float, stickiness: float, seed: int) -> None:
    p, random = torch.nn.Parameter(torch.zeros(n)), torch.Generator().manual_seed(seed)
    optimizer = feedback(p, density=density, stickiness=stickiness)
    waiting, k = torch.zeros(n, dtype=torch.float64), max(1, round(density * n))
    delta = k / (k + stickiness**2 * (n - k))
    for _ in range(5):
        p.grad = torch.randn(n, generator=random) ** 3
        whole = (waiting + p.grad.double()).square().sum()
        optimizer.step()
        waiting = waits(optimizer, p).double().clone()
        assert waiting.square().sum() <= (1 - delta) * whole * (1 + 1e-5)


@settings(max_examples=25)
@given(st.integers(2, 60), st.sampled_from([1, 3]), st.integers(0, 2**32))
def test_the_shadow_takes_dense_steps(n: int, every: int, seed: int) -> None:
    p, random = torch.nn.Parameter(torch.zeros(n)), torch.Generator().manual_seed(seed)
    optimizer, dense = feedback(p, density=0.2, refresh_every=every), torch.zeros(n)
    for _ in range(8):
        p.grad = torch.randint(-99, 100, (n,), generator=random).float()
        dense -= p.grad
        optimizer.step()
        assert torch.equal(p.detach() - waits(optimizer, p), dense)


@settings(max_examples=15)
@given(st.integers(4, 60), st.floats(0.05, 0.5), st.integers(0, 2**32))
def test_what_waits_is_bounded(n: int, density: float, seed: int) -> None:
    p, random = torch.nn.Parameter(torch.zeros(n)), torch.Generator().manual_seed(seed)
    optimizer = feedback(p, density=density, stickiness=1.0)
    delta, largest = max(1, round(density * n)) / n, 0.0
    drift = torch.randn(n, generator=random)
    for _ in range(20):
        p.grad = drift + 0.5 * torch.randn(n, generator=random)
        largest = max(largest, float(p.grad.square().sum()))
        optimizer.step()
        assert float(waits(optimizer, p).square().sum()) <= 4 * (1 - delta) * largest / delta**2 * (1 + 1e-5)


@settings(max_examples=3, deadline=None)
@given(st.sampled_from([0.1, 0.3]), st.sampled_from([50, 150]), st.integers(0, 2**32))
def test_the_bound_of_the_theorem_holds(density: float, horizon: int, seed: int) -> None:
    n, random = 50, torch.Generator().manual_seed(seed)
    curvature = torch.logspace(-1, 0, n)  # L = 1
    p = torch.nn.Parameter(torch.ones(n))
    rate, above = 1 / horizon**0.5, float((curvature * torch.ones(n)).sum() / 2)
    optimizer = feedback(p, density=density, lr=rate, stickiness=1.0)
    seen, second, delta = 0.0, 0.0, round(density * n) / n
    for _ in range(horizon):
        true = curvature * p.detach()
        noise = 2.0 * torch.randint(0, 2, (n,), generator=random) - 1
        p.grad = true + 0.3 * noise
        seen += float(true.square().sum()) / horizon
        second = max(second, float(true.square().sum()) + 0.09 * n)  # the expectation, at this point
        optimizer.step()
    price = 4 * rate**2 * second * (1 - delta) / delta**2
    assert seen <= 2 * above / (rate * horizon) + rate * second + price

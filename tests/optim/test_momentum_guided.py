"""MomentumGuided: what has no direction rests, what jumps wakes, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.errors import MalformedError, MisuseError
from thinwire.optim import MomentumGuided


def pair() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(64)), torch.nn.Parameter(torch.ones(64))]


def turn(params: list[torch.nn.Parameter], step: int) -> None:
    """The first tensor's gradient is always the same, the second's turns its sign each step."""
    params[0].grad, params[1].grad = torch.ones(64), torch.full((64,), (-1.0) ** step)


def frozen(every: int = 10, probe_every: int = 5) -> tuple[list[torch.nn.Parameter], MomentumGuided]:
    params = pair()
    guided = MomentumGuided(torch.optim.AdamW(params), freeze_below=0.2, every=every, probe_every=probe_every)
    for step in range(every):
        turn(params, step)
        guided.step()
    assert guided.frozen_tensors() == 1
    return params, guided


def test_only_what_has_no_direction_rests() -> None:
    params, guided = frozen()
    before = [p.detach().clone() for p in params]
    moments = guided.state[params[1]]["exp_avg"].clone()
    turn(params, 10)
    guided.step()
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    assert torch.equal(guided.state[params[1]]["exp_avg"], moments)
    assert params[1].grad is not None


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 12))
def test_a_jump_wakes_within_probe_every_steps(every: int, probe_every: int, calm: int) -> None:
    params, guided = frozen(every + 9, probe_every)
    for step in range(calm):
        turn(params, step)
        guided.step()
    assert guided.frozen_tensors() == 1
    before = params[1].detach().clone()
    for _ in range(probe_every):
        params[1].grad = torch.full((64,), 100.0)
        guided.step()
    assert not torch.equal(params[1], before)


def test_without_freezing_it_is_the_inner_optimiser() -> None:
    ours, theirs = pair(), pair()
    guided = MomentumGuided(torch.optim.AdamW(ours), freeze_below=0.0, every=1)
    plain = torch.optim.AdamW(theirs)
    for step in range(20):
        turn(ours, step)
        turn(theirs, step)
        guided.step()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_loaded_state_rests_where_the_saved_did() -> None:
    params, guided = frozen()
    others = pair()
    loaded = MomentumGuided(torch.optim.AdamW(others), freeze_below=0.2, every=10, probe_every=5)
    loaded.load_state_dict(guided.state_dict())
    assert loaded.frozen_tensors() == 1
    turn(others, 0)
    loaded.step()
    assert torch.equal(others[1], torch.ones(64))
    with pytest.raises(MalformedError):
        loaded.load_state_dict(torch.optim.AdamW(params).state_dict())


def test_groups_and_schedulers_are_the_inner_ones() -> None:
    params, guided = frozen()
    extra = torch.nn.Parameter(torch.ones(2))
    guided.add_param_group({"params": [extra]})
    assert guided.inner.param_groups[1]["params"] == [extra]
    torch.optim.lr_scheduler.StepLR(guided, 1, 0.5).step()
    assert guided.inner.param_groups[0]["lr"] == 0.0005
    guided.zero_grad()
    guided.step()
    assert params[0].grad is None


@pytest.mark.parametrize(
    "bad", [{"freeze_below": -0.1}, {"freeze_below": 2.0}, {"every": 0}, {"probe_every": 0}, {"jump": 0.5}]
)
def test_misuse_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        MomentumGuided(torch.optim.AdamW(pair()), **({"freeze_below": 0.1} | bad))

"""MomentumGuided: what has no direction rests, what jumps wakes, and nothing else changes."""

from __future__ import annotations

import copy
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


def rows_frozen(every: int = 10, probe_every: int = 5) -> tuple[torch.nn.Parameter, MomentumGuided]:
    """Of four rows, the odd ones' gradients turn their signs."""
    p = torch.nn.Parameter(torch.ones(4, 16))
    guided = MomentumGuided(
        torch.optim.AdamW([p]), freeze_below=0.2, every=every, probe_every=probe_every, granularity="row"
    )
    for step in range(every):
        p.grad = alternating(step)
        guided.step()
    assert (guided.frozen_rows(), guided.frozen_tensors()) == (2, 0)
    return p, guided


def alternating(step: int) -> torch.Tensor:
    return torch.tensor([1.0, (-1.0) ** step, 1.0, (-1.0) ** step])[:, None].expand(4, 16).clone()


def test_rows_without_direction_rest_and_the_others_step_as_ever() -> None:
    p, guided = rows_frozen()
    other = torch.nn.Parameter(p.detach().clone())
    plain = torch.optim.AdamW([other])
    plain.load_state_dict(copy.deepcopy(guided.inner.state_dict()))
    before, moments = p.detach().clone(), guided.state[p]["exp_avg"].clone()
    p.grad = other.grad = alternating(10)
    guided.step()
    plain.step()
    assert torch.equal(p[[1, 3]], before[[1, 3]])
    assert torch.equal(guided.state[p]["exp_avg"][[1, 3]], moments[[1, 3]])
    assert torch.equal(p[[0, 2]], other[[0, 2]])
    assert not torch.equal(p[[0, 2]], before[[0, 2]])


@settings(max_examples=15)
@given(st.integers(1, 12), st.integers(0, 12), st.sampled_from([100.0, float("nan")]))
def test_a_row_that_jumps_wakes_alone(probe_every: int, calm: int, size: float) -> None:
    p, guided = rows_frozen(19, probe_every)
    for step in range(calm):
        p.grad = alternating(step)
        guided.step()
    before = p.detach().clone()
    for step in range(probe_every):
        p.grad = alternating(step)
        p.grad[1] = size
        guided.step()
    assert not torch.equal(p[1], before[1])
    assert torch.equal(p[3], before[3])


def test_resting_rows_are_saved_and_a_tensor_of_them_is_left_out() -> None:
    p, guided = rows_frozen()
    other = torch.nn.Parameter(p.detach().clone())
    loaded = MomentumGuided(torch.optim.AdamW([other]), freeze_below=0.2, granularity="row")
    saved = guided.state_dict()
    loaded.load_state_dict(copy.deepcopy(saved))
    assert loaded.frozen_rows() == 2
    loaded._rows[other].fill_(1.0)
    other.grad = torch.full((4, 16), 0.01)
    steps = float(loaded.state[other]["step"])
    loaded.step()
    assert torch.equal(other, p)
    assert float(loaded.state[other]["step"]) == steps
    assert loaded.frozen_tensors() == 1
    saved["rows"][0] = torch.zeros(3)
    with pytest.raises(MalformedError, match="rows"):
        loaded.load_state_dict(saved)


@pytest.mark.parametrize(
    "bad",
    [
        {"granularity": "cell"},
        {"freeze_below": -0.1},
        {"freeze_below": 2.0},
        {"every": 0},
        {"probe_every": 0},
        {"jump": 0.5},
    ],
)  # fmt: skip
def test_misuse_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        MomentumGuided(torch.optim.AdamW(pair()), **({"freeze_below": 0.1} | bad))

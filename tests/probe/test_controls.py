"""Controls make steps of the same size that mean nothing."""

from __future__ import annotations

import pytest
import torch

from tests.probe.models import TinyLM, backward
from thinwire.errors import MisuseError
from thinwire.probe.controls import RandomGradientControl, shuffled_advantages


def make(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)  # type: ignore[arg-type]


def test_random_gradients_have_the_norms_of_the_real_ones() -> None:
    model = TinyLM(width=16, layers=1)
    backward(model, 0)
    control = RandomGradientControl(model, make)
    before = {n: p.detach().clone() for n, p in control.model.named_parameters()}
    model.norm.bias.grad = None
    model.norm.weight.grad = torch.full((16,), float("nan"))
    control.step(model, lr=0.5)
    for name, p in model.named_parameters():
        moved = (dict(control.model.named_parameters())[name] - before[name]).detach()
        if p.grad is None or p.grad.isnan().any():
            assert not moved.any()
        else:
            assert float(moved.norm()) == pytest.approx(0.5 * float(p.grad.norm()), rel=1e-3)
            if p.numel() > 200:
                cosine = torch.nn.functional.cosine_similarity(moved.flatten(), p.grad.flatten(), dim=0)
                assert abs(float(cosine)) < 6 / p.numel() ** 0.5
    assert torch.equal(model.embed.weight, before["embed.weight"])  # the real one stays


def test_a_control_is_a_function_of_its_seed_and_goes_on() -> None:
    model = TinyLM(width=16, layers=1)
    backward(model, 0)
    one, two, other = (RandomGradientControl(model, make, seed=seed) for seed in (1, 1, 2))
    for control in (one, two, other):
        control.step(model)
    assert torch.equal(one.model.head.weight, two.model.head.weight)
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    fresh = RandomGradientControl(model, make, seed=1)
    fresh.load_state_dict(one.state_dict())
    for control in (one, fresh):
        control.step(model)
    assert torch.equal(one.model.head.weight, fresh.model.head.weight)
    with pytest.raises(MisuseError):
        one.step(TinyLM(width=24, layers=1))


def test_tied_and_frozen_parameters_stay_tied_and_frozen() -> None:
    model = TinyLM(width=16, layers=1)
    model.head.weight = model.embed.weight
    model.norm.weight.requires_grad_(False)
    backward(model, 0)
    control = RandomGradientControl(model, make)
    control.step(model)
    assert control.model.head.weight is control.model.embed.weight
    assert torch.equal(control.model.norm.weight, model.norm.weight)


def test_advantages_are_shuffled_within_their_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    advantages = torch.arange(60.0)
    whole = shuffled_advantages(advantages, generator=generator)
    grouped = shuffled_advantages(advantages, group=6, generator=generator)
    assert sorted(whole.tolist()) == sorted(grouped.tolist()) == advantages.tolist()
    assert not torch.equal(whole, advantages)
    assert [sorted(part.tolist()) for part in grouped.view(-1, 6)] == advantages.view(-1, 6).tolist()
    firsts = [float(shuffled_advantages(torch.arange(3.0), generator=generator)[0]) for _ in range(600)]
    assert all(150 < firsts.count(value) < 250 for value in (0.0, 1.0, 2.0))
    assert shuffled_advantages(torch.ones(0)).shape == (0,)
    for bad in (
        {"advantages": torch.ones(2, 2)},
        {"advantages": torch.ones(5), "group": 2},
        {"advantages": torch.ones(4), "group": 0},
    ):
        with pytest.raises(MisuseError):
            shuffled_advantages(**bad)  # type: ignore[arg-type]

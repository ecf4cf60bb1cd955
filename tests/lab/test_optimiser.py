"""The optimiser's law: the served weights are always the fp32 master copies, rounded."""

from __future__ import annotations

import pytest
import torch

from thinwire.lab.optimiser import MasterAdamW


def layers(dtype: torch.dtype) -> torch.nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).to(dtype)


def learn(model: torch.nn.Sequential, optimiser: MasterAdamW, steps: int) -> list[float]:
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    norms = []
    for _ in range(steps):
        model(inputs).float().square().mean().backward()
        norms.append(optimiser.step())
    return norms


@pytest.mark.parametrize("lr", [1e-6, 1e-3])
def test_weights_are_the_masters_rounded_after_every_step(lr: float) -> None:
    model = layers(torch.bfloat16)
    optimiser = MasterAdamW(model, lr=lr)
    for _ in range(5):
        before = [master.clone() for master in optimiser.masters()]
        learn(model, optimiser, 1)
        for weight, master, old in zip(model.parameters(), optimiser.masters(), before, strict=True):
            assert master.dtype == torch.float32
            assert not torch.equal(master, old)
            assert torch.equal(weight, master.to(torch.bfloat16))
            assert weight.grad is None


def test_small_steps_are_kept_by_the_masters_where_bf16_would_lose_them() -> None:
    model = layers(torch.bfloat16)
    start = [weight.detach().clone() for weight in model.parameters()]
    optimiser = MasterAdamW(model, lr=1e-6)
    learn(model, optimiser, 1)
    changed = sum(int((w != s).sum()) for w, s in zip(model.parameters(), start, strict=True))
    elements = sum(weight.numel() for weight in model.parameters())
    assert 0 < changed < 0.1 * elements
    learn(model, optimiser, 200)
    later = sum(int((w != s).sum()) for w, s in zip(model.parameters(), start, strict=True))
    assert later > 5 * changed


def test_in_fp32_it_is_adamw() -> None:
    ours, theirs = layers(torch.float32), layers(torch.float32)
    optimiser = MasterAdamW(ours, lr=1e-2, weight_decay=0.1, clip_norm=1e9)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    learn(ours, optimiser, 10)
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(10):
        adamw.zero_grad()
        theirs(inputs).square().mean().backward()
        adamw.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference)


def test_frozen_weights_stay_and_a_rate_of_zero_moves_nothing() -> None:
    model = layers(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    optimiser = MasterAdamW(model, lr=1.0)
    optimiser.set_lr(0.0)
    before = [weight.detach().clone() for weight in model.parameters()]
    assert learn(model, optimiser, 2)[0] > 0
    assert all(torch.equal(w, b) for w, b in zip(model.parameters(), before, strict=True))
    optimiser.set_lr(1e-2)
    learn(model, optimiser, 1)
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[2])

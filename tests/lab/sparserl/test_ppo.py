"""The clipped objective beside a loop that says it in words; the critic learns the mean reward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.lab.rollouts import Rollouts, generate
from thinwire.lab.sparserl.ppo import Ppo, _features, ppo_loss


@given(st.integers(0, 10_000), st.floats(0.05, 0.5))
def test_the_loss_is_the_mean_over_tokens_of_the_worse_of_two(seed: int, clip: float) -> None:
    source = torch.Generator().manual_seed(seed)
    new, old, advantage = (torch.randn(3, 4, generator=source) for _ in range(3))
    mask = torch.randint(2, (3, 4), generator=source).float()
    total, count = 0.0, 0
    for i in range(3):
        for t in range(4):
            if mask[i, t]:
                ratio = float((new[i, t] - old[i, t]).exp())
                a = float(advantage[i, t])
                total += min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
                count += 1
    assert float(ppo_loss(new, old, mask, advantage, clip=clip)) == pytest.approx(-total / max(count, 1), abs=1e-4)


def test_at_a_ratio_of_one_the_gradient_is_that_of_reinforce() -> None:
    source = torch.Generator().manual_seed(0)
    old, advantage = torch.randn(2, 3, generator=source), torch.randn(2, 3, generator=source)
    new, mask = old.clone().requires_grad_(), torch.ones(2, 3)
    torch.autograd.backward(ppo_loss(new, old, mask, advantage))
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -advantage / 6)


class Still:
    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> float:
        self.steps += 1
        return 1.0


def batch_of(model: Any, rewards: torch.Tensor) -> Rollouts:
    made = generate(model, [[5, 6, 7]] * 8, tokens_max=3, end=1, generator=torch.Generator().manual_seed(2))
    return Rollouts(made.tokens, made.attention, made.mask, made.logprobs, rewards)


def test_it_takes_its_epochs_and_its_values_come_near_the_rewards(atom: Any) -> None:
    batch = batch_of(atom, torch.full((8,), 0.5))
    ppo, steps = Ppo(epochs=2), Still()
    for _ in range(60):
        report = ppo.step(atom, steps, batch)
    assert steps.steps == 120
    assert report.reward == 0.5
    values = ppo.values(_features(atom, batch)).detach()[batch.mask.bool()]
    assert float((values - 0.5).abs().mean()) < 0.2


def test_better_answers_become_likelier(atom: Any) -> None:
    batch = batch_of(atom, (torch.arange(8) % 2).float())
    Ppo().step(atom, Still(), batch)
    first = {name: p.grad.clone() for name, p in atom.named_parameters() if p.grad is not None}
    assert any(bool(g.abs().sum() > 0) for g in first.values())
    from thinwire.lab.rollouts import token_logprobs

    def odd_less_even() -> float:
        found = (token_logprobs(atom, batch.tokens, batch.attention, first=batch.prompt_width) * batch.mask).sum(dim=1)
        return float((found[1::2] - found[::2]).mean())

    with torch.no_grad():
        before = odd_less_even()
        for name, p in atom.named_parameters():
            if name in first:
                p -= 1e-2 * first[name]
        assert odd_less_even() > before


def test_nonsense_is_refused(atom: Any) -> None:
    for wrong in ({"epochs": 0}, {"clip": 0.0}, {"value_lr": -1.0}):
        with pytest.raises(MisuseError):
            Ppo(**wrong)  # type: ignore[arg-type]
    batch = batch_of(atom, torch.zeros(8))
    empty = Rollouts(batch.tokens, batch.attention, torch.zeros_like(batch.mask), batch.logprobs, batch.rewards)
    with pytest.raises(MisuseError, match="no answer tokens"):
        Ppo().step(atom, Still(), empty)

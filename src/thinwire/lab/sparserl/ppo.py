"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), the clipped objective with a learnt baseline.

The baseline is a linear function of the features that a token's scores are computed from (the last hidden state, not
trained through), so that it costs one small matrix and works for any causal language model.
"""

from __future__ import annotations

from typing import Any

import torch

from thinwire.errors import MisuseError
from thinwire.lab.grpo import StepReport
from thinwire.lab.optimiser import Stepping
from thinwire.lab.rollouts import Rollouts, token_logprobs

__all__ = ["Ppo", "ppo_loss"]


def ppo_loss(
    logprobs: torch.Tensor, behaviour: torch.Tensor, mask: torch.Tensor, advantage: torch.Tensor, *, clip: float = 0.2
) -> torch.Tensor:
    """The clipped objective of equation 7, negated, a mean over tokens: a scalar to minimise.

    All are fp32 [B, T]; ``mask`` is 1 at the answers' tokens. Without any, the loss is 0.
    """
    ratio = torch.exp((logprobs - behaviour) * mask)
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(objective * mask).sum() / mask.sum().clamp(min=1)


class Ppo:
    """Learns from batches; holds the value head and its optimiser.

    A batch is gone through ``epochs`` times, a step of the policy each. The reward comes with the last token and is not
    discounted, so the advantage of a token is the reward less the value there (GAE with gamma and lambda 1), whitened
    over the batch's tokens.

    Raises:
        MisuseError: ``epochs`` or ``clip`` is not positive.
    """

    def __init__(self, *, epochs: int = 1, clip: float = 0.2, value_lr: float = 1e-2) -> None:
        if epochs < 1 or clip <= 0 or value_lr <= 0:
            raise MisuseError("epochs, clip and value_lr are above 0")
        self.epochs, self.clip, self._value_lr = epochs, clip, value_lr
        self._weight: torch.Tensor | None = None
        self._optimiser: torch.optim.Optimizer | None = None

    def values(self, features: torch.Tensor) -> torch.Tensor:
        """The expected reward [B, T] at ``features`` [B, T, H]."""
        if self._weight is None:
            self._weight = torch.zeros(features.shape[-1] + 1, requires_grad=True)
            self._optimiser = torch.optim.Adam([self._weight], lr=self._value_lr)
        return features @ self._weight[:-1] + self._weight[-1]

    def step(self, model: Any, optimiser: Stepping, batch: Rollouts) -> StepReport:
        """``epochs`` optimiser steps on ``batch``; the report is of the last."""
        mask, first = batch.mask, batch.prompt_width
        if not bool(mask.any()):
            raise MisuseError("the batch has no answer tokens")
        features = _features(model, batch)
        returns = batch.rewards[:, None].expand_as(mask)
        advantage = (returns - self.values(features).detach()) * mask
        advantage = _whitened(advantage, mask)
        self._fit(features, returns, mask)
        loss = norm = drift = clipped = 0.0
        for _ in range(self.epochs):
            logprobs = token_logprobs(model, batch.tokens, batch.attention, first=first)
            part = ppo_loss(logprobs, batch.logprobs, mask, advantage, clip=self.clip)
            torch.autograd.backward(part)
            shift = (logprobs.detach() - batch.logprobs) * mask
            ratio = shift.exp()
            drift = float(shift.abs().sum() / mask.sum())
            clipped = float((((ratio - 1).abs() > self.clip) * mask).sum() / mask.sum())
            loss, norm = float(part.detach()), optimiser.step()
        return StepReport(loss, norm, float(batch.rewards.mean()), drift, clipped)

    def _fit(self, features: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> None:
        for _ in range(4):
            loss = ((self.values(features) - returns).square() * mask).sum() / mask.sum()
            assert self._optimiser is not None  # values() has made it
            self._optimiser.zero_grad()
            torch.autograd.backward(loss)
            self._optimiser.step()


@torch.no_grad()
def _features(model: Any, batch: Rollouts) -> torch.Tensor:
    """The state [B, T, H] from which each token was chosen: that of the token before it; 0 for the first."""
    out = model(
        input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False, output_hidden_states=True,
        position_ids=(batch.attention.cumsum(dim=1) - 1).clamp(min=0),
    )  # fmt: skip
    hidden = out.hidden_states[-1].float()[:, -batch.tokens.shape[1] :]
    shifted: torch.Tensor = torch.nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))
    return shifted


def _whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    count = mask.sum().clamp(min=1)
    mean = (values * mask).sum() / count
    spread = (((values - mean).square() * mask).sum() / count).sqrt()
    return (values - mean) / (spread + 1e-4) * mask

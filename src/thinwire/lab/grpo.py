"""Group relative policy optimisation (GRPO; Shao et al. 2024, arXiv:2402.03300), without a reference model.

:func:`advantages` compares the answers to one prompt with each other, :func:`grpo_loss` is the clipped objective on
answers that slightly older weights may have sampled, and :func:`grpo_step` is one optimiser step. The answers come
from :mod:`thinwire.lab.rollouts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from thinwire.errors import MisuseError
from thinwire.lab.optimiser import Stepping
from thinwire.lab.rollouts import Rollouts, token_logprobs

__all__ = ["StepReport", "advantages", "grpo_loss", "grpo_step"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimiser step did.

    ``loss`` is the negated objective. ``gradient_norm`` is taken before clipping. ``reward`` is the batch's mean.
    ``drift`` is the mean of ``|log w|`` over answer tokens, w being the ratio of the trained weights' probability to
    the sampling weights': how far off-policy the batch was. ``clipped`` is the share of tokens with w outside the
    clipping range.
    """

    loss: float
    gradient_norm: float
    reward: float
    drift: float
    clipped: float


def advantages(rewards: torch.Tensor, group: int, *, epsilon: float = 1e-4) -> torch.Tensor:
    """Each reward relative to its group: (r - mean) / (standard deviation + epsilon), fp32 [B].

    A group in which all rewards are equal teaches nothing: its advantages are 0.

    Raises:
        MisuseError: the number of rewards is not a multiple of ``group``, or ``group`` is less than 2.

    >>> advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    if group < 2 or rewards.numel() % group:
        raise MisuseError(
            f"{rewards.numel()} rewards do not make groups of {group}; use a multiple, and groups of 2 or more",
            rewards=rewards.numel(),
            group=group,
        )
    grouped = rewards.float().view(-1, group)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    centred[(grouped == grouped[:, :1]).all(dim=1)] = 0.0  # the mean of equal numbers may be rounded off them
    return (centred / (grouped.std(dim=1, keepdim=True) + epsilon)).flatten()


def grpo_loss(
    logprobs: torch.Tensor,
    behaviour: torch.Tensor,
    mask: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> torch.Tensor:
    """The clipped objective, negated: a scalar to minimise.

    For token t of answer i with ratio ``w = exp(logprobs - behaviour)``, the objective is ``min(w A_i,
    clip(w, 1 - clip_low, 1 + clip_high) A_i)``, averaged over the answer's tokens and then over answers (equation 3
    of the paper, with no KL term). ``behaviour`` holds the log-probabilities under the weights that sampled the
    answer, so a batch that is some versions old is corrected for. ``clip_high`` above ``clip_low`` is DAPO's
    (arXiv:2503.14476). At a ratio of 1 the gradient is that of REINFORCE with these advantages.

    ``logprobs``, ``behaviour`` and ``mask`` are fp32 [B, T], ``advantage`` is fp32 [B]. An answer without tokens
    counts as 0.
    """
    ratio = torch.exp((logprobs - behaviour) * mask)
    scale = advantage[:, None]
    objective = torch.minimum(ratio * scale, ratio.clamp(1 - clip_low, 1 + clip_high) * scale)
    per_answer = (objective * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return -per_answer.mean()


def grpo_step(
    model: Any,
    optimiser: Stepping,
    batch: Rollouts,
    *,
    group: int,
    advantage: torch.Tensor | None = None,
    rows_max: int = 128,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> StepReport:
    """One optimiser step on ``batch``, whose answers come in groups of ``group`` to one prompt.

    At most ``rows_max`` answers go through the model at once; the gradient is that of the whole batch. Answers whose
    advantage is 0 have none and are left out of the model's work and of ``drift`` and ``clipped``. ``advantage`` (fp32
    [B]) stands in for that of :func:`advantages`, for studies that change it.

    Raises:
        MisuseError: the batch does not divide into groups, or there is not one advantage an answer.
    """
    if advantage is None:
        advantage = advantages(batch.rewards, group)
    if advantage.shape != batch.rewards.shape:
        raise MisuseError(f"{advantage.numel()} advantages for {batch.rewards.numel()} answers")
    useful = advantage.nonzero().flatten()
    total = batch.mask[useful].sum().clamp(min=1)
    loss = drift = clipped = 0.0
    for rows in torch.split(useful, rows_max):
        if not len(rows):
            break
        mask = batch.mask[rows]
        logprobs = token_logprobs(model, batch.tokens[rows], batch.attention[rows], first=batch.prompt_width)
        part = grpo_loss(
            logprobs, batch.logprobs[rows], mask, advantage[rows], clip_low=clip_low, clip_high=clip_high
        ) * (len(mask) / len(batch.rewards))
        torch.autograd.backward(part)
        shift = (logprobs.detach() - batch.logprobs[rows]) * mask
        ratio = shift.exp()
        loss += float(part.detach())
        drift += float(shift.abs().sum() / total)
        clipped += float((((ratio < 1 - clip_low) | (ratio > 1 + clip_high)) * mask).sum() / total)
    return StepReport(
        loss=loss,
        gradient_norm=optimiser.step(),
        reward=float(batch.rewards.mean()),
        drift=drift,
        clipped=clipped,
    )

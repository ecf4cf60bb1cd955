"""Sampled answers: made by a model, scored by a task, carried as tensors.

Shapes: B answers, T tokens of prompt and answer together, V tokens in the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from thinwire.errors import MisuseError
from thinwire.lab.tasks import Problem, Task

__all__ = ["Rollouts", "Tokenizer", "concatenate", "generate", "sample", "token_logprobs"]


class Tokenizer(Protocol):
    """Text to tokens and back; ``end`` ends an answer and ``pad`` fills rows up."""

    @property
    def pad(self) -> int: ...

    @property
    def end(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt or of an answer."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer, up to its end token."""
        ...


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Answers to prompts, with what is needed to learn from them.

    ``tokens`` int64 [B, T]: the prompt, padded on the left, then the answer, padded on the right. ``attention``
    int64 [B, T]: 1 where ``tokens`` is not padding. ``mask`` fp32 [B, T]: 1 at the answer's tokens, its end token
    among them. ``logprobs`` fp32 [B, T]: log-probability of each answer token under the sampling weights, 0
    elsewhere. ``rewards`` fp32 [B]. Answers to one prompt are adjacent.
    """

    tokens: torch.Tensor
    attention: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    rewards: torch.Tensor

    @property
    def prompt_width(self) -> int:
        """Number of columns before the first answer token; T if there is none."""
        columns = self.mask.any(dim=0).nonzero()
        return int(columns[0]) if len(columns) else self.mask.shape[1]

    def answers(self) -> list[list[int]]:
        """The answers' tokens, without prompts and padding."""
        return [row[chosen.bool()].tolist() for row, chosen in zip(self.tokens, self.mask, strict=True)]


def token_logprobs(model: Any, tokens: torch.Tensor, attention: torch.Tensor, *, first: int = 1) -> torch.Tensor:
    """Log-probability of each token from column ``first`` on, given those before it: fp32 [B, T].

    Columns before ``first`` are 0 and cost no logits, which saves most of the memory where V is large. ``model`` is
    called as a Transformers causal language model; the softmax is taken in fp32 whatever its dtype.

    Raises:
        MisuseError: ``first`` is not in 1 to T: nothing comes before the token in column 0.
    """
    width = tokens.shape[1]
    if not 1 <= first <= width:
        raise MisuseError(f"first is {first}; use 1 to {width}", first=first)
    out = model(
        input_ids=tokens,
        attention_mask=attention,
        position_ids=_positions(attention),
        use_cache=False,
        logits_to_keep=width - first + 1,
    )
    scores = torch.log_softmax(out.logits[:, :-1].float(), dim=-1)
    chosen = scores.gather(-1, tokens[:, first:, None]).squeeze(-1)
    return torch.nn.functional.pad(chosen, (first, 0))


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokens_max: int,
    end: int,
    pad: int = 0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollouts:
    """Sample one answer to each prompt, up to its end token or ``tokens_max`` tokens; rewards are left at 0.

    ``temperature`` 0 takes the likeliest token. Log-probabilities are those of the softmax at temperature 1 that
    :func:`token_logprobs` computes, so other temperatures are refused: their answers could not be learned from.

    Raises:
        MisuseError: no prompt, an empty prompt, or a temperature other than 0 and 1.
    """
    if not prompts or not all(prompts) or temperature not in (0.0, 1.0):
        raise MisuseError("generate needs prompts of at least one token and a temperature of 0 or 1")
    from transformers import DynamicCache

    width = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    attention = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    mask = torch.zeros(tokens.shape)
    logprobs = torch.zeros(tokens.shape)
    running = torch.ones(len(prompts), dtype=torch.bool)
    cache = DynamicCache(config=model.config)
    fresh, places = tokens, _positions(attention)
    for _ in range(tokens_max):
        out = model(
            input_ids=fresh,
            attention_mask=attention,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        scores = torch.log_softmax(out.logits[:, -1].float(), dim=-1)
        if temperature:
            chosen = torch.multinomial(scores.exp(), 1, generator=generator)
        else:
            chosen = scores.argmax(dim=-1, keepdim=True)
        counts = running[:, None]
        fresh = torch.where(counts, chosen, pad)
        tokens = torch.cat([tokens, fresh], dim=1)
        attention = torch.cat([attention, counts.long()], dim=1)
        mask = torch.cat([mask, counts.float()], dim=1)
        logprobs = torch.cat([logprobs, torch.where(counts, scores.gather(-1, chosen), 0.0)], dim=1)
        places = places[:, -1:] + 1
        running &= chosen[:, 0] != end
        if not running.any():
            break
    return Rollouts(tokens, attention, mask, logprobs, torch.zeros(len(prompts)))


def sample(
    model: Any,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    *,
    group: int,
    tokens_max: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollouts:
    """``group`` answers to each problem, with their rewards; B = ``len(problems) * group``.

    Raises:
        MisuseError: as :func:`generate`.
    """
    asked = [problem for problem in problems for _ in range(group)]
    prompts = {problem.prompt: tokenizer.encode(problem.prompt) for problem in problems}
    answered = generate(
        model,
        [prompts[problem.prompt] for problem in asked],
        tokens_max=tokens_max,
        end=tokenizer.end,
        pad=tokenizer.pad,
        temperature=temperature,
        generator=generator,
    )
    rewards = [
        task.reward(problem, tokenizer.decode(answer))
        for problem, answer in zip(asked, answered.answers(), strict=True)
    ]
    return dataclasses.replace(answered, rewards=torch.tensor(rewards))


def concatenate(batches: Sequence[Rollouts], *, pad: int = 0) -> Rollouts:
    """One batch of all answers, in order; prompts are padded on the left and answers on the right as needed.

    Raises:
        MisuseError: there is no batch.
    """
    if not batches:
        raise MisuseError("no rollouts to concatenate")
    left = max(batch.prompt_width for batch in batches)
    right = max(batch.mask.shape[1] - batch.prompt_width for batch in batches)

    def joined(name: str, value: int) -> torch.Tensor:
        rows = []
        for batch in batches:
            column = getattr(batch, name)
            before = left - batch.prompt_width
            after = right - (column.shape[1] - batch.prompt_width)
            rows.append(torch.nn.functional.pad(column, (before, after), value=value))
        return torch.cat(rows)

    return Rollouts(
        joined("tokens", pad),
        joined("attention", 0),
        joined("mask", 0),
        joined("logprobs", 0),
        torch.cat([batch.rewards for batch in batches]),
    )


def _positions(attention: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own text: padding on the left does not count."""
    return (attention.cumsum(dim=1) - 1).clamp(min=0)

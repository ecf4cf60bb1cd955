"""What an RL run does with a recipe: sample, evaluate, and before all that learn from examples."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thinwire.errors import MisuseError
from thinwire.lab.optimiser import MasterAdamW
from thinwire.lab.recipes import Recipe
from thinwire.lab.rollouts import Rollouts, sample, token_logprobs
from thinwire.lab.tasks import Problem, problem_set

__all__ = ["Evaluation", "evaluate", "learn_from_answers", "rollouts_for", "warm_start"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Rewards on held-out problems: ``sampled`` and ``greedy`` are means over problems, fp64 in [0, 1].

    ``per_problem`` is each problem's mean reward over its samples, for paired comparisons.
    """

    sampled: float
    greedy: float
    per_problem: tuple[float, ...]


def rollouts_for(recipe: Recipe, model: Any, source: random.Random, generator: torch.Generator) -> Rollouts:
    """One batch to learn from: answers of ``model`` to ``recipe.prompts`` new problems."""
    problems = [recipe.task.problem(source) for _ in range(recipe.prompts)]
    return sample(
        model,
        recipe.tokenizer,
        recipe.task,
        problems,
        group=recipe.group,
        tokens_max=recipe.answer_tokens_max,
        generator=generator,
    )


def evaluate(recipe: Recipe, model: Any, *, seed: int, problems: int | None = None, greedy: bool = True) -> Evaluation:
    """Rewards on ``problems`` problems (the recipe's number of them) that depend on ``seed`` only.

    The samples are drawn with a fixed seed too, so that two evaluations differ by the weights alone. ``greedy`` False
    leaves the greedy pass out and reports 0 for it.
    """
    held_out = problem_set(recipe.task, problems or recipe.evaluation_problems, seed)
    generator = torch.Generator().manual_seed(seed)

    def rewards(group: int, temperature: float) -> torch.Tensor:
        parts = [
            sample(
                model,
                recipe.tokenizer,
                recipe.task,
                held_out[start : start + 128],
                group=group,
                tokens_max=recipe.answer_tokens_max,
                temperature=temperature,
                generator=generator,
            ).rewards
            for start in range(0, len(held_out), 128)
        ]
        return torch.cat(parts).view(-1, group).mean(dim=1)

    sampled = rewards(recipe.evaluation_samples, 1.0)
    likeliest = float(rewards(1, 0.0).mean()) if greedy else 0.0
    return Evaluation(float(sampled.mean()), likeliest, tuple(sampled.tolist()))


def warm_start(recipe: Recipe, model: Any, *, seed: int, on_step: Callable[[int, float], None] | None = None) -> int:
    """Teach ``model`` from right answers until its own are right often enough to learn from; returns the steps made.

    Batches of 128 problems, AdamW, cross-entropy on the answers. Every fifth step, sampled answers to 128 held-out
    problems are scored and reported to ``on_step(step, reward)``; at ``recipe.warm_target`` it ends.

    Raises:
        MisuseError: the target was not reached in ``recipe.warm_steps_max`` steps.
    """
    if recipe.warm_target <= 0:
        return 0
    optimiser = MasterAdamW(model, lr=recipe.warm_lr)
    source = random.Random(f"warm {seed}")
    reward = 0.0
    for step in range(1, recipe.warm_steps_max + 1):
        learn_from_answers(recipe, model, [recipe.task.problem(source) for _ in range(128)])
        optimiser.set_lr(recipe.warm_lr * min(1.0, step / 20))
        optimiser.step()
        if step % 5 == 0:
            reward = evaluate(recipe, model, seed=-1, problems=128, greedy=False).sampled
            if on_step is not None:
                on_step(step, reward)
            if reward >= recipe.warm_target:
                return step
    raise MisuseError(
        f"the warm start reached a reward of {reward:.2f} after {recipe.warm_steps_max} steps, not "
        f"{recipe.warm_target:.2f}; allow more steps or another learning rate",
        reward=reward,
    )


def learn_from_answers(recipe: Recipe, model: Any, problems: Sequence[Problem], *, prompts_too: bool = False) -> float:
    """Add the gradient of the mean cross-entropy of the right answers' tokens, and return it (nats).

    ``prompts_too`` counts the prompts' tokens but their first as well, as pre-training does.
    """
    tokenizer = recipe.tokenizer
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    answers = [[*tokenizer.encode(p.answer), tokenizer.end][: recipe.answer_tokens_max] for p in problems]
    left, right = max(map(len, prompts)), max(map(len, answers))
    tokens, attention = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        before, after = left - len(prompt), right - len(answer)
        tokens.append([tokenizer.pad] * before + prompt + answer + [tokenizer.pad] * after)
        attention.append([0] * before + [1] * (len(prompt) + len(answer)) + [0] * after)
    row = torch.tensor(attention)
    first = 1 if prompts_too else left
    mask = row[:, first:] * row[:, first - 1 : -1]  # a row's first token has none before it
    logprobs = token_logprobs(model, torch.tensor(tokens), row, first=first)[:, first:]
    loss = -(logprobs * mask).sum() / mask.sum()
    torch.autograd.backward(loss)
    return float(loss.detach())

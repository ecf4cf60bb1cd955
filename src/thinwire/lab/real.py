"""Real sequences of weights for benchmarks: what an RL trainer would publish, step by step."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from thinwire.lab.grpo import grpo_step
from thinwire.lab.optimiser import MasterAdamW
from thinwire.lab.recipes import RECIPES
from thinwire.lab.rollouts import concatenate
from thinwire.lab.smollm2 import fetch_smollm2
from thinwire.lab.training import rollouts_for, warm_start

__all__ = ["grpo_versions", "smollm2_grpo_versions"]


def grpo_versions(model_name: str, steps: int, lr: float, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The bf16 state dict of a model before RL and after each of ``steps`` GRPO steps.

    ``model_name`` is a name in :data:`thinwire.lab.recipes.RECIPES`. Tied weights appear once. Each state is a copy.
    One process samples and learns in turn, so every batch is on-policy.

    Example (seconds)::

        first, second = grpo_versions("nano", 1, lr=1e-5, seed=1)
        changed = sum(int((first[name] != second[name]).sum()) for name in first)
    """
    recipe = RECIPES[model_name]()
    model = recipe.pretrained(seed)
    warm_start(recipe, model, seed=seed)
    optimiser = MasterAdamW(model, lr=lr)
    source, generator = random.Random(f"rollouts {seed}"), torch.Generator().manual_seed(seed)
    for step in range(steps + 1):
        if step:
            batch = concatenate(
                [rollouts_for(recipe, model, source, generator) for _ in range(recipe.batches)],
                pad=recipe.tokenizer.pad,
            )
            grpo_step(model, optimiser, batch, group=recipe.group, rows_max=recipe.rows_max)
        yield {name: weight.detach().clone() for name, weight in model.named_parameters()}


def smollm2_grpo_versions(steps: int, lr: float = 1e-6, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """:func:`grpo_versions` of SmolLM2-135M on sums; the model is fetched if the cache does not hold it.

    Raises:
        RetryError, RefetchError, MisuseError: as :func:`thinwire.lab.smollm2.fetch_smollm2`.
    """
    fetch_smollm2()
    yield from grpo_versions("smollm2", steps, lr, seed)

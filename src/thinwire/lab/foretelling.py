"""Can it be foretold which weights a step of RL will change? Predictors on real runs, tested where none was fitted.

Predictors (:mod:`thinwire.probe.prediction`) and small models that are fitted (:mod:`thinwire.probe.prediction_models`)
see a run's first half. They are tested on its second half, on a run with another seed, and on one with another task.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thinwire.errors import MisuseError
from thinwire.lab.grpo import grpo_step
from thinwire.lab.optimiser import MasterAdamW
from thinwire.lab.recipes import RECIPES
from thinwire.lab.rollouts import concatenate
from thinwire.lab.tasks import SortDigits, Task
from thinwire.lab.training import rollouts_for, warm_start
from thinwire.probe.prediction import Features, PredictionScore, Watch
from thinwire.probe.prediction_models import compare

__all__ = ["ForetellingOptions", "foretell"]

Row = dict[str, Any]
Observed = list[tuple[Features, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class ForetellingOptions:
    """What to run: a recipe, its learning rate, steps of each run, the seed to learn from and the one to test on, how
    many weights are looked at."""

    recipe: str = "nano"
    lr: float = 1e-5
    steps: int = 32
    seed: int = 0
    other_seed: int = 1
    sample: int = 200_000

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise MisuseError(f"there is no recipe {self.recipe!r}; use one of {', '.join(RECIPES)}")
        if self.steps < 8 or not self.lr > 0:
            raise MisuseError("give 8 steps or more, and a positive learning rate")


def _observe(options: ForetellingOptions, seed: int, task: Task | None = None) -> Observed:
    """What was known before each step, and what it changed."""
    recipe = RECIPES[options.recipe]()
    model = recipe.pretrained(seed)
    warm_start(recipe, model, seed=seed)
    if task is not None:
        recipe = dataclasses.replace(recipe, task=task)
    optimiser = MasterAdamW(model, lr=options.lr)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    masters = dict(zip(names, optimiser.masters(), strict=True))
    watch = Watch(masters, optimiser.optimizer, sample=options.sample, seed=0)
    source, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    found: Observed = []
    for _ in range(options.steps):
        parts = [rollouts_for(recipe, model, source, generator) for _ in range(recipe.batches)]
        known = watch.before()
        batch = concatenate(parts, pad=recipe.tokenizer.pad)
        grpo_step(model, optimiser, batch, group=recipe.group, rows_max=recipe.rows_max)
        found.append((known, watch.after()))
    return found


def foretell(options: ForetellingOptions | None = None, *, say: Callable[[str], None] | None = None) -> list[Row]:
    """A row for each setting (``later steps``, ``other seed``, ``other task``) and predictor: ``average_precision``,
    ``f1`` at the true count, and the ``base_rate`` that a random guess would have; means over steps.

    Settings in which no weight changes (a task that earns no reward) are left out.

    Raises:
        MisuseError: the warm start fails.
    """
    options = options or ForetellingOptions()
    tell = say or (lambda _: None)
    cut = options.steps // 2
    tell("the run that is learned from")
    first = _observe(options, options.seed)
    rows = _rows("later steps", compare(first[2:cut], first[cut:]))
    tell("another seed")
    rows += _rows("other seed", compare(first[2:], _observe(options, options.other_seed)[cut:]))
    tell("another task")
    task = RECIPES[options.recipe]().task
    shorter = SortDigits(max(1, task.length - 1)) if isinstance(task, SortDigits) else None
    if shorter is not None:
        other = [pair for pair in _observe(options, options.other_seed, shorter)[cut:] if bool(pair[1].any())]
        rows += _rows("other task", compare(first[2:], other)) if other else []
    return rows


def _rows(setting: str, found: Mapping[str, Sequence[PredictionScore]]) -> list[Row]:
    def mean(scores: Sequence[PredictionScore], name: str) -> float:
        return float(sum(getattr(score, name) for score in scores) / len(scores))

    return [
        {"setting": setting, "predictor": name, "steps": len(scores)}
        | {value: mean(scores, value) for value in ("average_precision", "f1", "base_rate")}
        for name, scores in found.items()
        if scores
    ]

"""One run of a study: train, and count after every step what changed, beside what rounding alone would have changed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from thinwire.lab.grpo import advantages, grpo_step
from thinwire.lab.recipes import Recipe
from thinwire.lab.study.curved import Curved, curvature_of, curvature_once
from thinwire.lab.study.matrix import Run, Study
from thinwire.lab.study.models import is_made_here, recipe_for, start_of
from thinwire.lab.study.overlap import Masks
from thinwire.lab.study.rewards import Rewarded
from thinwire.lab.study.stepping import Stepper, optimiser_of
from thinwire.lab.tasks import Task
from thinwire.lab.training import evaluate, learn_from_answers, rollouts_for
from thinwire.probe.changes import Changes, compare
from thinwire.probe.kinds import place_of
from thinwire.probe.null_simulation import Shadow
from thinwire.probe.rank import effective_rank

__all__ = ["LAGS", "train"]

LAGS = (1, 8, 32)
_EVALUATION_SEED = -2
_SAMPLE = 1 << 15


class _Watch:
    """What is kept of the weights that are served, and what a step of rounding alone would change of them."""

    def __init__(self, stepper: Stepper, make: Callable[..., torch.optim.Optimizer], weights: str, seed: int) -> None:
        self._served = {name: p.detach() for name, p in stepper.parameters.items()}
        self._kept = {lag: {name: p.clone() for name, p in self._served.items()} for lag in LAGS}
        self._groups = {name: self._group(name) for name in self._served}
        view = torch.bfloat16 if weights == "masters" else None
        self._owned = stepper.owned
        self._shadow = Shadow(stepper.owned, make, view=view, lags=LAGS, sample=_SAMPLE, seed=seed)
        self.masks = Masks(self._served)
        self.rows: list[dict[str, Any]] = []

    @staticmethod
    def _group(name: str) -> tuple[str, str]:
        place = place_of(name)
        return ".".join(map(str, place.layer)) or "outside", place.kind

    def step(self, step: int, gradient_rms: dict[str, float]) -> None:
        self.masks.step()
        self._shadow.set_rms(gradient_rms)
        for lag, null in self._shadow.step().items():
            sums: dict[tuple[str, str], tuple[Changes, float]] = {}
            for name, now in self._served.items():
                changes = compare(self._kept[lag][name], now, renew=True)
                before, expected = sums.get(self._groups[name], (Changes(), 0.0))
                sums[self._groups[name]] = before + changes, expected + null.tensors[name] * changes.elements
            for (layer, kind), (changes, expected) in sums.items():
                self.rows.append({
                    "step": step, "lag": lag, "layer": layer, "kind": kind, "elements": changes.elements,
                    "changed": changes.changed, "null": expected, "squares": changes.squares,
                    "weight_squares": changes.weight_squares,
                })  # fmt: skip
        self._shadow.restart_from(self._owned)  # where all lags start anew: the null is of the weights as they are


def _gradient_rms(stepper: Stepper, clip_norm: float) -> tuple[dict[str, float], float]:
    """Root mean squares of the gradients as they are after clipping, and the norm of all before it."""
    squares = {n: float(p.grad.float().square().sum()) if p.grad is not None else 0.0
               for n, p in stepper.parameters.items()}  # fmt: skip
    norm = sum(squares.values()) ** 0.5
    scale = min(1.0, clip_norm / max(norm, 1e-30))
    return {n: scale * (squares[n] / max(p.numel(), 1)) ** 0.5 for n, p in stepper.parameters.items()}, norm


class _Counted:
    """A stepper that is watched: what trains the model calls ``step``."""

    def __init__(self, stepper: Stepper, watch: _Watch) -> None:
        self._stepper, self._watch = stepper, watch
        self.steps = 0

    def step(self) -> float:
        rms, _ = _gradient_rms(self._stepper, 1.0)
        norm = self._stepper.step()
        self.steps += 1
        self._watch.step(self.steps, rms)
        return norm


def _rl_step(
    recipe: Recipe, model: Any, counted: _Counted, run: Run, source: random.Random, generator: torch.Generator
) -> tuple[float, float, float]:
    batch = rollouts_for(recipe, model, source, generator)
    advantage = advantages(batch.rewards, recipe.group)
    if run.control == "shuffled":
        advantage = advantage[torch.randperm(len(advantage), generator=generator)]
    report = grpo_step(model, counted, batch, group=recipe.group, advantage=advantage)
    return report.loss, report.reward, report.gradient_norm


def train(study: Study, run: Run, starts: Path, *, masks: Path | None = None) -> dict[str, Any]:
    """Make one run. Equal runs give equal results, but for ``seconds``.

    The record: ``run`` and ``lr``; ``before`` and ``after``, exact rewards on held-out problems (sampled and greedy);
    by step the ``losses``, ``rewards`` (RL: of its own answers) and ``norms`` of gradients; ``rows``, what changed by
    step, lag, layer and kind: ``elements``, ``changed``, ``null`` (what random gradients would have changed, of a
    simulated sample); ``ranks``, the effective (entropy) rank of each matrix's whole change beside its full one;
    ``consecutive``, the mean overlap of what successive steps changed; ``curvature`` before and after, for runs that
    the study wants it of. Which weights changed is written to ``masks``.
    """
    began = time.perf_counter()
    torch.manual_seed(run.draw)
    recipe = recipe_for(study, run)
    trained = replace(recipe, task=_rewarded(recipe.task, run))
    model = start_of(study, run, starts)
    make = optimiser_of(run.optimiser, study.lr(run))
    stepper = Stepper(
        model, make, weights=run.weights, control=run.control, enforce=run.enforce, density=run.density, seed=run.draw
    )
    before = evaluate(recipe, model, seed=_EVALUATION_SEED)
    first = {name: p.detach().float().clone() for name, p in stepper.owned.items()}
    curved = [_curvature_at_start(recipe, model, run, starts)] if run in study.curved else []
    watch = _Watch(stepper, make, run.weights, run.draw)
    counted = _Counted(stepper, watch)
    source, generator = random.Random(f"run {run.draw}"), torch.Generator().manual_seed(run.draw)
    losses, rewards, norms = [], [], []
    for _ in range(run.steps):
        if run.objective == "rl":
            loss, reward, norm = _rl_step(trained, model, counted, run, source, generator)
            rewards.append(reward)
        else:
            count = recipe.prompts * recipe.group
            problems = [recipe.task.problem(source) for _ in range(count)]
            loss = learn_from_answers(recipe, model, problems, prompts_too=run.objective == "pretrain")
            norm = counted.step()
        losses.append(loss)
        norms.append(norm)
    after = evaluate(recipe, model, seed=_EVALUATION_SEED)
    if curved:
        curved.append(curvature_of(recipe, model, seed=run.seed))
    if masks is not None:
        watch.masks.save(masks)
    return {
        "id": study.id(run), "run": asdict(run), "lr": study.lr(run), "made_here": is_made_here(study.sizes[run.size]),
        "parameters": sum(p.numel() for p in stepper.owned.values()),
        "before": {"sampled": before.sampled, "greedy": before.greedy},
        "after": {"sampled": after.sampled, "greedy": after.greedy},
        "losses": losses, "rewards": rewards, "norms": norms, "rows": watch.rows,
        "ranks": _ranks(first, stepper.owned), "consecutive": watch.masks.consecutive, "curvature": curved,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _curvature_at_start(recipe: Recipe, model: Any, run: Run, starts: Path) -> Curved:
    kind = "random" if run.objective == "pretrain" else "warm"
    name = f"{kind}-{run.size}-{run.start or run.task}-{run.task}-{run.weights}-{run.seed}.json"
    return curvature_once(recipe, model, starts / "curvature" / name, seed=run.seed)


def _rewarded(task: Task, run: Run) -> Task:
    if not isinstance(task, Rewarded):
        raise TypeError("recipe_for makes rewarded tasks")
    return replace(task, kind=run.reward, source=random.Random(f"noise {run.draw}"))


def _ranks(first: dict[str, torch.Tensor], last: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    found = {}
    for name, old in first.items():
        change = last[name].detach().float() - old
        if change.dim() == 2:
            found[name] = [effective_rank(change), float(min(change.shape))]
    return found

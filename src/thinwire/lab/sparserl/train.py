"""One run of the benchmark: a model, a task, a method, an algorithm, a seed; everything that is measured of it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from thinwire.errors import MisuseError, RefuseError
from thinwire.lab.grpo import grpo_step
from thinwire.lab.recipes import Recipe
from thinwire.lab.rollouts import Rollouts
from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting, state_bytes
from thinwire.lab.sparserl.ppo import Ppo
from thinwire.lab.sparserl.publishing import Sender, as_published
from thinwire.lab.sparserl.registry import find
from thinwire.lab.sparserl.starts import context_of, read_start, recipe_of, score_of
from thinwire.lab.training import evaluate, rollouts_for
from thinwire.probe.tracker import SparsityTracker

__all__ = ["ALGORITHMS", "Cell", "DivergedError", "Learner", "train"]

ALGORITHMS = ("grpo", "ppo", "trl-grpo", "trl-rloo")
_FLOPS_AT = 1  # step at which they are counted; the others cost the same but for the length of answers
_TUNE_SEED = -3


class DivergedError(Exception):
    """A loss or a gradient became infinite or NaN; the run ends there and is recorded so."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    ``model`` are the model's settings, ``model_name`` their name; ``others`` the tasks that are scored before and after
    to tell what was forgotten. ``part``: ``test``, or ``tune`` for a run that only serves to choose a learning rate,
    is scored on other problems and neither measured nor asked what it forgot.
    """

    model_name: str
    model: Mapping[str, Any]
    task: str
    method: str
    lr: float
    seed: int
    algorithm: str = "grpo"
    steps: int = 64
    prompts: int = 8
    group: int = 8
    problems: int = 256
    clip_norm: float = 1.0
    others: tuple[str, ...] = ()
    part: str = "test"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise MisuseError(f"there is no algorithm {self.algorithm!r}; there are {', '.join(ALGORITHMS)}")
        if min(self.steps, self.prompts, self.problems) < 1 or self.group < 2 or not 0 < self.lr < 1e6:
            raise MisuseError("steps, prompts and problems are 1 or more, group 2 or more, lr above 0")


@dataclass(slots=True)
class Learner:
    """Takes gradients as the algorithms leave them: clips, steps, and after each step publishes and counts.

    ``rows`` has a mapping for each step: ``norm`` (before clipping), ``sync_bytes`` (the patch's file),
    ``sync_payload``, ``changed`` (published elements of other bits), ``null`` (elements that random gradients would
    have changed).

    Raises:
        DivergedError: by :meth:`step`, for a gradient that is infinite or NaN.
    """

    prepared: Prepared
    clip_norm: float
    seed: int
    measured: bool = True
    rows: list[dict[str, float]] = field(default_factory=list)
    whole_bytes: int = 0
    _sender: Sender | None = None
    _tracker: SparsityTracker | None = None

    def __post_init__(self) -> None:
        if self.measured:
            self._sender = Sender(self.prepared.sent)
            self.whole_bytes = self._sender.whole_bytes

    def step(self) -> float:
        """One step of the optimiser; gradients are removed. Returns their norm."""
        trained = list(self.prepared.trained.values())
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.clip_norm))
        if not math.isfinite(norm):
            self.rows.append({"norm": norm})
            raise DivergedError(f"the gradient's norm is {norm} in step {len(self.rows) + 1}")
        self.prepared.optimiser.step()
        row = {"norm": norm}
        if self._sender is not None:
            sent = self._sender.send(self.prepared.sent)
            row |= {
                "sync_bytes": sent.size,
                "sync_payload": sent.payload,
                "changed": sent.changed,
                "null": self._null(),
            }
        for p in trained:
            p.grad = None
        self.rows.append(row)
        if not all(bool(torch.isfinite(p).all()) for p in trained):
            raise DivergedError(f"a weight is infinite or NaN after step {len(self.rows)}")
        return norm

    def _null(self) -> float:
        """Elements that a step of random gradients would have changed, of those that are watched."""
        watched = self.prepared.watch()
        if watched is None:
            return 0.0
        tensors, optimiser = watched
        if self._tracker is None:
            self._tracker = SparsityTracker(
                tensors, optimizer=optimiser, null=self.prepared.remake, mode="fast", view=torch.bfloat16,
                sample=1 << 13, seed=self.seed, frozen=True,
                gradient_rms=dict.fromkeys(tensors, 1.0),  # all methods step by AdamW's rule, which has no scale
            )  # fmt: skip
        null = self._tracker.step().shortest.null
        return 0.0 if null is None else null * sum(t.numel() for t in tensors.values())


def _flops(work: Any) -> tuple[Any, int]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        found = work()
    return found, int(counter.get_total_flops())


def _rollouts(recipe: Recipe, prepared: Prepared, source: random.Random, generator: torch.Generator) -> Rollouts:
    with as_published(prepared.trained):  # workers sample with what they were sent
        return rollouts_for(recipe, prepared.model, source, generator)


@contextmanager
def _finite() -> Iterator[None]:
    """Sampling from logits that overflowed is torch's error; here it means that the run diverged."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise DivergedError(f"answers cannot be sampled: {error}") from error


def train(cell: Cell, starts: Path) -> dict[str, Any]:
    """Make one run; equal cells give equal results but for ``seconds``. The start must have been made.

    The record: ``status`` (``success``, or ``diverged`` with what went wrong in ``error``); ``before`` and ``after`` of
    the task and by name of ``others`` (rewards ``sampled`` and ``greedy``, ``loss`` of right answers); ``steps``, a row
    each (reward, loss, and those of :class:`Learner`); ``flops`` of the run, estimated from its first step;
    ``optimiser_bytes``, ``whole_bytes`` (all that is published, once), ``trainable`` and ``total`` numbers.

    Raises:
        MisuseError: an unknown task or method, or no start.
    """
    began = time.perf_counter()
    torch.manual_seed(cell.seed)
    method: Method = find("method", cell.method)
    start = read_start(cell.model, cell.model_name, cell.seed, starts)
    total = sum(p.numel() for p in start.model.parameters())
    recipe = recipe_of(cell.model, cell.task, "train", prompts=cell.prompts, group=cell.group, problems=cell.problems)
    context = recipe.tokenizer.encode(context_of(recipe.task, random.Random(cell.seed), 64))
    prepared = method.prepare(start.model, Setting(cell.lr, cell.steps, cell.seed, tuple(context)))
    learner = Learner(prepared, cell.clip_norm, cell.seed, measured=cell.part == "test")
    curve: list[dict[str, float]] = []
    status, error, flops = "success", "", 0
    scores: dict[str, Any] = {"after": None, "others_after": {}}
    try:
        with _finite():
            flops = _learn(cell, recipe, learner, curve)
            scores = _scores(cell, prepared)
    except (DivergedError, RefuseError) as problem:
        status, error = "diverged", str(problem)
    empty: dict[str, float] = {}  # a run that diverged may have a row of one kind more than of the other
    pairs = zip_longest(curve, learner.rows, fillvalue=empty)
    rows = [{"step": number, **learnt, **stepped} for number, (learnt, stepped) in enumerate(pairs, start=1)]
    return {
        "status": status, "error": error, "before": start.scores.get(cell.task, {}),
        "others_before": {task: start.scores[task] for task in cell.others},
        **scores,
        "steps": rows, "flops": flops, "optimiser_bytes": state_bytes(prepared.optimiser),
        "whole_bytes": learner.whole_bytes, "trainable": prepared.trainable, "total": total,
        "published": sum(t.numel() for t in prepared.sent.values()), "settings": dict(prepared.settings),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _learn(cell: Cell, recipe: Recipe, learner: Learner, curve: list[dict[str, float]]) -> int:
    """All steps; returns the floating-point operations that they took."""
    if cell.algorithm.startswith("trl-"):
        from thinwire.lab.sparserl.trl_runs import learn_with_trl

        return learn_with_trl(cell, recipe, learner, curve)
    prepared = learner.prepared
    source, generator = random.Random(f"run {cell.seed}"), torch.Generator().manual_seed(cell.seed)
    ppo = Ppo() if cell.algorithm == "ppo" else None

    def step() -> None:
        batch = _rollouts(recipe, prepared, source, generator)
        if ppo is not None:
            report = ppo.step(prepared.model, learner, batch)
        else:
            report = grpo_step(prepared.model, learner, batch, group=cell.group)
        curve.append({"reward": report.reward, "loss": report.loss})
        if not math.isfinite(report.loss):
            raise DivergedError(f"the loss is {report.loss} in step {len(curve)}")

    flops = 0
    for number in range(1, cell.steps + 1):
        if number == _FLOPS_AT and cell.part == "test":
            flops = _flops(step)[1] * cell.steps
        else:
            step()
    return flops


def _scores(cell: Cell, prepared: Prepared) -> dict[str, Any]:
    """Scores of what was published last."""
    with as_published(prepared.trained):
        if cell.part == "tune":
            recipe = recipe_of(cell.model, cell.task, "tune", problems=cell.problems)
            found = evaluate(recipe, prepared.model, seed=_TUNE_SEED, greedy=False)
            return {"after": {"sampled": found.sampled}, "others_after": {}}
        after = {
            task: score_of(cell.model, prepared.model, task, problems=cell.problems)
            for task in (cell.task, *cell.others)
        }
    return {"after": after.pop(cell.task), "others_after": after}

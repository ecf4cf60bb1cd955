"""The trainer's process: learn from the rollouts that arrive, publish every step.

Run by the director as ``python -m thinwire.lab.demo.trainer FOLDER``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import thinwire
from thinwire.errors import RetryError
from thinwire.lab.demo.journal import Journal
from thinwire.lab.demo.options import RunPlan
from thinwire.lab.demo.spool import Batch, SpoolReader
from thinwire.lab.grpo import grpo_step
from thinwire.lab.optimiser import MasterAdamW
from thinwire.lab.recipes import RECIPES, Recipe
from thinwire.lab.rollouts import concatenate
from thinwire.lab.training import evaluate, warm_start

__all__ = ["main"]

_EVALUATION_SEED = 20_000
_SILENCE_MAX_S = 300.0


def main(folder: Path) -> None:
    """Train as ``folder/run.json`` says.

    Raises:
        RetryError: no rollouts arrived for five minutes.
    """
    torch.set_num_threads(1)
    plan = RunPlan.load(folder)
    journal = Journal(plan.journals, "trainer", 1)
    recipe = RECIPES[plan.model]()
    model = recipe.pretrained(plan.seed)
    journal.write("built", weights=sum(weight.numel() for weight in model.parameters()))
    warm_start(recipe, model, seed=plan.seed, on_step=lambda step, reward: journal.write("warm", step=step, r=reward))
    _evaluate(recipe, model, journal, "before")
    _learn(plan, recipe, model, journal)
    _evaluate(recipe, model, journal, "after")
    journal.write("done")


def _evaluate(recipe: Recipe, model: Any, journal: Journal, moment: str) -> None:
    result = evaluate(recipe, model, seed=_EVALUATION_SEED)
    journal.write("evaluated", moment=moment, **asdict(result))


def _learn(plan: RunPlan, recipe: Recipe, model: Any, journal: Journal) -> None:
    """Publish the weights, then one version for each optimiser step until steps or time are used up."""
    publisher = thinwire.Publisher(str(plan.store), dtype=torch.bfloat16, level="smallest")
    optimiser = MasterAdamW(model, lr=plan.lr)
    arrivals = _arrivals(SpoolReader(plan.spool))
    report = publisher.publish(model, step=0)
    journal.write("published", **_facts(report))
    begin = time.monotonic()
    for step in range(1, plan.steps + 1):
        clock = time.monotonic()
        batches = _fresh(arrivals, report.version, plan.max_staleness, recipe.batches, journal)
        waited = time.monotonic()
        rollouts = concatenate([batch.rollouts for batch in batches], pad=recipe.tokenizer.pad)
        learnt = grpo_step(model, optimiser, rollouts, group=recipe.group, rows_max=recipe.rows_max)
        stepped = time.monotonic()
        staleness = [report.version - batch.version for batch in batches]
        report = publisher.publish(model, step=step)
        journal.write(
            "published",
            **_facts(report),
            **asdict(learnt),
            staleness=staleness,
            workers=[batch.worker for batch in batches],
            wait_s=waited - clock,
            step_s=stepped - waited,
        )
        if time.monotonic() - begin > plan.seconds:
            break
    journal.write("trained", version=report.version, digest=report.digest)


def _arrivals(spool: SpoolReader) -> Iterator[Batch]:
    """Batches as they come, until the director is gone.

    Raises:
        RetryError: none came for five minutes.
        SystemExit: the director was killed; there is nobody to train for.
    """
    director = os.getppid()
    heard = time.monotonic()
    while True:
        if os.getppid() != director:
            raise SystemExit("the director is gone")
        for batch in spool.take():
            yield batch
            heard = time.monotonic()
        if time.monotonic() - heard > _SILENCE_MAX_S:
            raise RetryError(f"no worker has sent rollouts for {_SILENCE_MAX_S:.0f} s; look at the workers' logs")
        time.sleep(0.005)


def _fresh(arrivals: Iterator[Batch], version: int, staleness_max: int, count: int, journal: Journal) -> list[Batch]:
    """The next ``count`` batches that are at most ``staleness_max`` versions old; older ones are dropped."""
    batches: list[Batch] = []
    for batch in arrivals:
        if version - batch.version > staleness_max:
            journal.write("dropped", worker=batch.worker, version=batch.version, newest=version)
            continue
        batches.append(batch)
        if len(batches) == count:
            break
    return batches


def _facts(report: thinwire.PublishReport) -> dict[str, Any]:
    """The publisher's report as it goes into the journal."""
    return {
        "version": report.version,
        "step": report.step,
        "digest": report.digest,
        "kind": report.kind,
        "patch_bytes": report.patch_bytes,
        "anchor_bytes": report.anchor_bytes,
        "total_bytes": report.total_bytes,
        "full_bytes": report.full_bytes,
        "changed": report.changed,
        "elements": report.elements,
        "density": report.density,
        "seconds": dict(report.seconds),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))

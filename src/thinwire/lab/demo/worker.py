"""A worker's process: follow the store, sample with the weights it holds, hand the rollouts to the trainer.

Run by the director as ``python -m thinwire.lab.demo.worker FOLDER NAME LIFE``.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

import thinwire
from thinwire.lab.demo.journal import Journal
from thinwire.lab.demo.options import RunPlan
from thinwire.lab.demo.spool import SpoolWriter
from thinwire.lab.recipes import RECIPES
from thinwire.lab.training import rollouts_for
from thinwire.sync.consumer import ApplyResult
from thinwire.sync.encode import take_snapshot
from thinwire.sync.layout import StateSource
from thinwire.tensors.tree import state_of

__all__ = ["main"]

_WAITING_MAX = 1
_FIRST_VERSION_MAX_S = 600.0


def main(folder: Path, name: str, life: int) -> None:
    """Work as ``folder/run.json`` says, until ``folder/stop`` exists or the director is gone."""
    torch.set_num_threads(1)
    director = os.getppid()
    plan = RunPlan.load(folder)
    journal = Journal(plan.journals, name, life)
    recipe = RECIPES[plan.model]()
    # Other weights than the trainer's: everything this worker is right about, it has from the store.
    model = recipe.skeleton(plan.seed + 1_000)
    consumer = thinwire.Consumer(str(plan.store), poll_s=0.05)
    spool = SpoolWriter(plan.spool, name, life)
    source = random.Random(f"{plan.seed} {name} {life}")
    generator = torch.Generator().manual_seed(source.getrandbits(62))
    journal.write("ready")
    held = consumer.load(model, timeout_s=_FIRST_VERSION_MAX_S)
    digest = _own_digest(model)
    journal.write("applied", **_facts(held), own_digest=digest)
    while not plan.stop.exists() and os.getppid() == director:
        # Each version in turn, though only the newest is needed to sample: so that every one is checked here.
        while (newer := consumer.poll(every=True)) is not None:
            held = newer.apply(model)
            digest = _own_digest(model)
            journal.write("applied", **_facts(held), own_digest=digest)
        if spool.waiting() >= _WAITING_MAX:
            time.sleep(0.01)
            continue
        begin = time.monotonic()
        rollouts = rollouts_for(recipe, model, source, generator)
        spool.put(rollouts, held.version, digest)
        journal.write(
            "sampled",
            version=held.version,
            digest=digest,
            answers=len(rollouts.rewards),
            reward=float(rollouts.rewards.mean()),
            seconds=time.monotonic() - begin,
        )
    journal.write("done", version=held.version, digest=_own_digest(model))


def _own_digest(model: torch.nn.Module) -> str:
    """The digest of the weights as they lie in this process, whatever the consumer says about them."""
    return take_snapshot(StateSource(state_of(model)), threads=1).tree.digest


def _facts(report: ApplyResult) -> dict[str, Any]:
    """The consumer's report as it goes into the journal."""
    return {
        "version": report.version,
        "step": report.step,
        "digest": report.digest,
        "bytes_fetched": report.bytes_fetched,
        "hops": report.hops,
        "seconds": dict(report.seconds),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

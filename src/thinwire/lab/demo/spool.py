"""Rollouts on their way from workers to the trainer: one file each, written aside and renamed.

A worker may be killed at any moment. A half-written file keeps its temporary name and is never seen; a queue shared
between processes could be left locked or torn. Each worker may have a few files waiting and then has to stop: the
trainer sets the pace, so rollouts stay fresh.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from thinwire.lab.rollouts import Rollouts

__all__ = ["Batch", "SpoolReader", "SpoolWriter"]

_FIELDS = ("tokens", "attention", "mask", "logprobs", "rewards")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rollouts, and which weights of which worker made them."""

    rollouts: Rollouts
    worker: str
    version: int
    digest: str


class SpoolWriter:
    """A worker's side."""

    def __init__(self, folder: Path, worker: str, life: int) -> None:
        self._folder = folder
        self._worker = worker
        self._life = life
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def waiting(self) -> int:
        """How many of this worker's files, of this or an earlier life, the trainer has not taken."""
        return sum(1 for _ in self._folder.glob(f"*.{self._worker}.*.rollouts"))

    def put(self, rollouts: Rollouts, version: int, digest: str) -> None:
        """Hand over one batch; it appears whole or not at all."""
        self._count += 1
        name = f"{version:08d}.{self._worker}.{self._life:03d}-{self._count:06d}"
        aside = self._folder / f"{name}.partial"
        tensors = {field: getattr(rollouts, field) for field in _FIELDS}
        save_file(tensors, aside, {"worker": self._worker, "version": str(version), "digest": digest})
        os.replace(aside, self._folder / f"{name}.rollouts")


class SpoolReader:
    """The trainer's side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def take(self) -> Iterator[Batch]:
        """Remove and return the batches that are there, those of the oldest weights first."""
        for path in sorted(self._folder.glob("*.rollouts")):
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                rollouts = Rollouts(*(file.get_tensor(field) for field in _FIELDS))
            path.unlink()
            yield Batch(rollouts, facts["worker"], int(facts["version"]), facts["digest"])

"""Checkpoints of a run with several workers: a folder each, which is there whole or not at all.

``step-00000120/`` holds ``shared.pt``, written by rank 0 (model, optimiser, position), and ``rank-K.pt`` for each
worker (random state, what compression has held back). All write into a hidden folder beside it; when all are done,
rank 0 renames it. Workers on several machines need a folder that all of them see.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.trainer.workers import Workers

__all__ = ["Checkpoint", "Checkpoints", "read_checkpoint"]

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read: rank 0's part, and every worker's own, by rank."""

    path: Path
    shared: dict[str, Any]
    own: list[dict[str, Any]]


class Checkpoints:
    """The newest ``keep`` checkpoints of a run, in ``folder``."""

    def __init__(self, folder: Path, workers: Workers, *, keep: int) -> None:
        self._folder, self._workers, self._keep = folder, workers, keep

    def write(self, step: int, shared: Mapping[str, Any], own: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step`` and delete what is now too old; all workers call this together."""
        final = self._folder / f"step-{step:08d}"
        partial = self._folder / f".step-{step:08d}.partial"
        if self._workers.first:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it wrote
            partial.mkdir(parents=True)
            _save(partial / "shared.pt", {**shared, "step": step, "workers": self._workers.size})
        self._workers.barrier()
        _save(partial / f"rank-{self._workers.rank}.pt", own)
        self._workers.barrier()
        if self._workers.first:
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            for old in _found(self._folder)[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)
        self._workers.barrier()
        return final

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole."""
        found = _found(self._folder)
        return found[-1] if found else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, each worker's part included; no code in it is run.

    Raises:
        MisuseError: there is none at ``path``.
        MalformedError: it is damaged, or parts are missing.
    """
    if not (path / "shared.pt").is_file():
        raise MisuseError(f"there is no checkpoint at {path}; give a folder step-NNNNNNNN", path=str(path))
    shared = _load(path / "shared.pt")
    workers = shared.get("workers")
    if not isinstance(workers, int) or not 1 <= workers <= 1 << 16:
        raise MalformedError(f"{path} does not say how many workers wrote it", path=str(path))
    return Checkpoint(path, shared, [_load(path / f"rank-{k}.pt") for k in range(workers)])


def _found(folder: Path) -> list[Path]:
    names = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(names, key=lambda x: int(x[0][1]))]


def _save(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("xb") as file:
        torch.save(dict(value), file)
        file.flush()
        os.fsync(file.fileno())


def _load(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MalformedError(f"{path} is missing; take an older checkpoint", path=str(path)) from None
    except Exception as error:  # torch names no class for what is wrong with a file
        raise MalformedError(f"{path} is damaged: {error}; take an older checkpoint", path=str(path)) from error
    if not isinstance(found, dict):
        raise MalformedError(f"{path} holds no state; take an older checkpoint", path=str(path))
    return found

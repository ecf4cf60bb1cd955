"""Carrying a study out: runs in processes of their own, one result file each, so that a study that was killed goes on.

``OUT/runs/ID.json`` is the whole result of a run and appears whole or not at all; ``OUT/masks/ID.npz`` says which
weights it changed; ``OUT/starts`` holds the models that were warm-started. A run that fails is noted in
``OUT/failed/ID.json`` and tried again the next time.
"""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.pool import workers
from thinwire.lab.study.matrix import Run, Study

__all__ = ["Record", "pending", "read_records", "run_study"]

Record = dict[str, Any]
"""The result of a run, as :func:`thinwire.lab.study.train.train` makes it."""


def _write(path: Path, value: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump(value, file, allow_nan=True)
    os.replace(scratch, path)


def _result(out: Path, study: Study, run: Run) -> Path:
    return out / "runs" / f"{study.id(run)}.json"


def pending(study: Study, out: Path) -> list[Run]:
    """The runs of the study that have no result yet."""
    return [run for run in study.runs if not _result(out, study, run).exists()]


def read_records(study: Study, out: Path) -> list[Record]:
    """The results that there are, in the order of the study's runs.

    Raises:
        MalformedError: a result cannot be read; its file is named, and removing it makes the study run it again.
    """
    found = []
    for run in study.runs:
        path = _result(out, study, run)
        if path.exists():
            try:
                found.append(json.loads(path.read_text()))
            except ValueError as error:
                raise MalformedError(f"{path} is damaged ({error}); remove it, and it is run again") from error
    return found


def _make_start(study: Study, run: Run, out: Path) -> None:
    from thinwire.lab.study.models import start_of

    start_of(study, run, out / "starts")


def _make_run(study: Study, run: Run, out: Path) -> None:
    from thinwire.lab.study.overlap import masks_file
    from thinwire.lab.study.train import train

    masks = masks_file(out, study.id(run))
    masks.parent.mkdir(parents=True, exist_ok=True)
    _write(_result(out, study, run), train(study, run, out / "starts", masks=masks))  # the masks first


def _starts_of(study: Study, runs: Sequence[Run]) -> list[Run]:
    """One run for each model that has to be warm-started before any of ``runs``."""
    from thinwire.lab.study.models import is_made_here

    needed = [run for run in runs if run.objective != "pretrain" and is_made_here(study.sizes[run.size])]
    return list({(run.size, run.start or run.task, run.seed): run for run in needed}.values())


def run_study(
    study: Study, out: Path, *, jobs: int = 2, on_done: Callable[[str, Run, bool], None] | None = None
) -> list[Run]:
    """Make all runs that have no result in ``out`` yet, ``jobs`` at a time; returns those that failed.

    ``on_done(stage, run, sound)`` is told of every warm ``start`` and every ``run`` as it ends.

    Raises:
        MisuseError: ``jobs`` is not positive.
    """
    if jobs < 1:
        raise MisuseError(f"jobs is {jobs}; give 1 or more")
    runs = pending(study, out)
    lean = replace(study, runs=(), about={})  # what is sent with each run
    failed: list[Run] = []
    with workers(jobs) as pool:
        for stage, work, chosen in (("start", _make_start, _starts_of(study, runs)), ("run", _make_run, runs)):
            for run, error in pool.do(partial(work, lean), chosen, out):
                if on_done is not None:
                    on_done(stage, run, error is None)
                if error is not None and stage == "run":
                    failed.append(run)
                note = out / "failed" / f"{study.id(run)}.json"
                if error is None:
                    with suppress(FileNotFoundError):
                        note.unlink()
                else:
                    text = "".join(traceback.format_exception(error))
                    _write(note, {"run": str(run), "stage": stage, "error": text})
    return failed

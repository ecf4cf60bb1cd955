"""A sparsity tracker for the Transformers ``Trainer``, and so for TRL's (GRPO, RLOO, SFT, DPO), which derive from it.

::

    trainer = GRPOTrainer(model, ..., callbacks=[SparsityCallback("sparsity", null=True)])

Needs the extra ``rl``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from thinwire.integrations.tracking import log_values, plain_optimizer
from thinwire.probe.statistics import StepStats
from thinwire.probe.tracker import SparsityTracker

__all__ = ["SparsityCallback"]

_STATE = "sparsity_tracker.pt"


class SparsityCallback(TrainerCallback):
    """Measures after every optimiser step, adds the latest numbers to the trainer's logs, and keeps them.

    Args:
        folder: where ``history.jsonl`` is written while training, and ``history.parquet`` and ``history.png`` at its
            end; None keeps no files.
        figure: draw ``history.png`` (needs Matplotlib).
        settings: those of :class:`~thinwire.probe.tracker.SparsityTracker`: ``mode="fast"``, ``null=True``, ...

    Process 0 measures; under FSDP, its shard. A checkpoint of the trainer holds the tracker's state, so that a run that
    is resumed measures its first step against the last one before it.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, figure: bool = True, **settings: Any) -> None:
        self.folder = None if folder is None else Path(folder)
        self.tracker: SparsityTracker | None = None
        self.stats: StepStats | None = None
        self._figure, self._settings = figure, settings
        self._logged = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the first snapshot."""
        if not state.is_world_process_zero:
            return
        log = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = self.folder / "history.jsonl"
        optimizer = plain_optimizer(kwargs["optimizer"])
        self.tracker = SparsityTracker(kwargs["model"], optimizer=optimizer, log=log, **self._settings)
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE
        if state.global_step and saved.is_file():
            self.tracker.load_state_dict(torch.load(saved, weights_only=False))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, while the gradients are still there."""
        if self.tracker is not None:
            self.stats = self.tracker.step(state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the latest numbers to what is logged. Reporters that come before this callback do not see them."""
        if self.stats is None or logs is None or self.stats.step == self._logged:
            return
        self._logged = self.stats.step
        values = log_values(self.stats)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the tracker's state into the checkpoint."""
        if self.tracker is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                scratch = folder / f"{_STATE}.tmp"
                torch.save(self.tracker.state_dict(), scratch)
                os.replace(scratch, folder / _STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the table and the figure."""
        if self.tracker is not None and self.folder is not None and self.stats is not None:
            self.tracker.save(self.folder / "history.parquet")
            if self._figure:
                self.tracker.plot(self.folder / "history.png")

"""A sparsity tracker for Lightning's ``Trainer``.

::

    trainer = lightning.Trainer(callbacks=[SparsityCallback(null=True)])

Needs ``lightning``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback

from thinwire.integrations.tracking import log_values, plain_optimizer
from thinwire.probe.statistics import StepStats
from thinwire.probe.tracker import SparsityTracker

__all__ = ["SparsityCallback"]


class SparsityCallback(Callback):
    """Measures after every optimiser step (not after every batch, where gradients are accumulated) and logs it.

    ``settings`` are those of :class:`~thinwire.probe.tracker.SparsityTracker`. The first optimiser is the one that a
    null follows. Process 0 measures; under FSDP, its shard. The trainer's checkpoints hold the tracker's state.
    """

    def __init__(self, **settings: Any) -> None:
        self.tracker: SparsityTracker | None = None
        self.stats: StepStats | None = None
        self._settings = settings
        self._steps = 0
        self._saved: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the first snapshot."""
        if not trainer.is_global_zero:
            return
        optimizer = plain_optimizer(trainer.optimizers[0]) if trainer.optimizers else None
        self.tracker = SparsityTracker(pl_module, optimizer=optimizer, **self._settings)
        self._steps = trainer.global_step
        if self._saved is not None:
            self.tracker.load_state_dict(self._saved)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Measure, if the optimiser has made a step."""
        if self.tracker is None or trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        self.stats = self.tracker.step(trainer.global_step)
        pl_module.log_dict(log_values(self.stats), rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {} if self.tracker is None else {"tracker": self.tracker.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it from a checkpoint; it is used when training starts."""
        self._saved = state_dict.get("tracker")

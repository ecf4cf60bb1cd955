"""Publishing for the Transformers ``Trainer``, and so for TRL's (GRPO, RLOO, SFT, DPO), which derive from it.

::

    trainer = GRPOTrainer(model, ..., callbacks=[PublishCallback("s3://bucket/run")])

Needs the extra ``rl``.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from thinwire.integrations.publishing import Publishing, log_values
from thinwire.stores import Store
from thinwire.sync.publisher import PublishReport

__all__ = ["PublishCallback"]


class PublishCallback(TrainerCallback):
    """Publishes the weights that training starts from, then those after every ``every``-th optimiser step and the last.

    Args:
        store: as :class:`~thinwire.sync.publisher.Publisher` takes it.
        every: in optimiser steps (``global_step``), not in batches.
        settings: those of :class:`~thinwire.integrations.publishing.Publishing`: ``dtype`` (bfloat16 by default),
            ``adapters`` (``alone`` or ``merged``), ``wait``, ``metadata``; and the publisher's: ``level``, ``key``, ...

    Process 0 publishes; a version's step is the trainer's. The upload goes on behind the next step; when training ends,
    all that is pending has gone out. A run that is resumed goes on in the same store: the weights of its checkpoint
    are its next version, even where that takes workers back by some steps. The newest version's bytes, density and
    seconds are added to the trainer's logs.

    Raises:
        RetryError: (at the end of training) the store has failed too long for what is pending to go out.
        ConflictError: another run publishes to this store.
    """

    def __init__(self, store: str | Store, *, every: int = 1, **settings: Any) -> None:
        self.publishing = Publishing(store, every=every, **settings)
        self._logged = 0

    @property
    def report(self) -> PublishReport | None:
        """Of the newest version that is known to be committed."""
        return self.publishing.report

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish what training starts from, so that workers can begin."""
        self.publishing.publish(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish, if it is this step's turn."""
        self.publishing.step(kwargs["model"], state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the newest version's numbers to what is logged. Reporters before this callback do not see them."""
        report = self.publishing.report
        if report is None or logs is None or report.version == self._logged:
            return
        self._logged = report.version
        values = log_values(report)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish the last weights, unless that has been done, and wait until all is out."""
        if self.publishing.last_step != state.global_step or args.load_best_model_at_end:
            self.publishing.publish(kwargs["model"], state.global_step)
        self.publishing.flush()

"""Publishing for Lightning's ``Trainer``.

::

    trainer = lightning.Trainer(callbacks=[PublishCallback("s3://bucket/run", module="model")])

Needs ``lightning``.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from thinwire.errors import MisuseError
from thinwire.integrations.publishing import Publishing, log_values
from thinwire.stores import Store

__all__ = ["PublishCallback"]


class PublishCallback(Callback):
    """Publishes the weights that training starts from, then those after every ``every``-th optimiser step and the last.

    Args:
        store: as :class:`~thinwire.sync.publisher.Publisher` takes it.
        every: in optimiser steps (``global_step``), not in batches.
        module: attribute of the ``LightningModule`` that holds the model, such as ``model`` or ``policy.net``, so that
            tensors get the names that they have in it; all of the module by default.
        settings: those of :class:`~thinwire.integrations.publishing.Publishing`, and the publisher's.

    Process 0 publishes. What is pending goes out when training ends, by itself or by an error.
    """

    def __init__(self, store: str | Store, *, every: int = 1, module: str | None = None, **settings: Any) -> None:
        self.publishing = Publishing(store, every=every, **settings)
        self._module = module
        self._steps = 0
        self._logged = 0

    def _model(self, pl_module: Any) -> torch.nn.Module:
        found = pl_module
        for part in (self._module or "").split("."):
            found = getattr(found, part, None) if part else found
        if not isinstance(found, torch.nn.Module):
            raise MisuseError(f"the LightningModule has no module {self._module!r}; name the attribute that holds it")
        return found

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Publish what training starts from."""
        self._steps = trainer.global_step
        self.publishing.publish(self._model(pl_module), trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Publish, if the optimiser has made a step and it is this one's turn."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        self.publishing.step(self._model(pl_module), trainer.global_step)
        report = self.publishing.report
        if report is not None and report.version != self._logged:
            self._logged = report.version
            pl_module.log_dict(log_values(report), rank_zero_only=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Publish the last weights, unless that has been done, and wait until all is out."""
        if self.publishing.last_step != trainer.global_step:
            self.publishing.publish(self._model(pl_module), trainer.global_step)
        self.publishing.flush()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let what is pending go out."""
        self.publishing.flush()

"""Publishing from a training loop, whatever drives it: what the callbacks of trainers share.

>>> import torch, thinwire
>>> model = torch.nn.Linear(16, 16)
>>> publishing = Publishing("memory://doc-publishing", every=2)
>>> publishing.publish(model, step=0)
>>> for step in range(1, 5):
...     with torch.no_grad():
...         _ = model.weight.mul_(1.01)
...     publishing.step(model, step)  # versions at steps 2 and 4
>>> publishing.flush().version
3
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from thinwire.errors import MisuseError, RetryError
from thinwire.integrations.gathering import gathered_state, unwrapped
from thinwire.integrations.tracking import plain_optimizer
from thinwire.stores import Store
from thinwire.sync.publisher import Publisher, PublishReport
from thinwire.sync.sharded_publisher import ShardedPublisher

__all__ = ["Adapters", "Publishing", "State", "log_values", "state_to_publish"]

Adapters = Literal["alone", "merged"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class State:
    """Tensors by name, on process 0 (empty on others where the model is sharded), and what a version says of them."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]


@contextmanager
def state_to_publish(
    model: torch.nn.Module, *, adapters: Adapters = "alone", dtype: torch.dtype | None = None, whole: bool = True
) -> Iterator[State]:
    """What there is to publish of a model that trains. All processes enter together where it is sharded.

    Wrappers (DDP, ``torch.compile``, activation checkpointing) leave no trace in the names. FSDP's shards are gathered
    tensor by tensor on process 0, as ``dtype``; with ``whole=False`` each process keeps its shards. Of a PEFT model it
    is the adapter alone, under the names that PEFT saves; or, with ``adapters="merged"``, the base with the adapter
    merged in, under the base's names, and when the block ends the base has its own weights again, bit for bit.

    The metadata say ``thinwire.adapter`` (``alone`` or ``merged``) and ``thinwire.peft`` (the adapter's configuration
    as JSON) for a PEFT model, and nothing for another.

    Raises:
        MisuseError: DeepSpeed's ZeRO-3 holds the parameters; the adapter cannot be merged, or is merged already; FSDP
            shards a model whose adapter is to be merged.
    """
    plain = unwrapped(model)
    if not hasattr(plain, "peft_config"):
        yield State(gathered_state(plain, dtype=dtype, whole=whole), {})
        return
    from thinwire.integrations.adapters import adapter_metadata, adapter_state, merged_state

    if adapters == "alone":
        alone = adapter_state(plain, dtype=dtype, whole=whole)
        yield State(alone, {"thinwire.adapter": "alone", **adapter_metadata(plain)})
        return
    with merged_state(plain) as tensors:
        yield State(tensors, {"thinwire.adapter": "merged", **adapter_metadata(plain)})


class Publishing:
    """Publishes a model's weights every few steps of a loop; every process calls it, process 0 publishes.

    Args:
        store: as :class:`~thinwire.sync.publisher.Publisher` takes it. Opened by process 0, at the first version.
        every: publish when the step is a multiple of this.
        dtype: publish floating-point tensors as this type, as workers serve them; None leaves them as they are.
        adapters: of a PEFT model, the adapter ``alone`` or the base with it ``merged`` in (:func:`state_to_publish`).
        sharded: publish with a :class:`~thinwire.sync.sharded_publisher.ShardedPublisher`: each process its own shards,
            nothing is gathered. Engines, ``thinwire follow`` and ``ShardedConsumer`` follow it; ``Consumer`` does not.
        wait: stay until a version is committed. By default only the pass over the weights holds the loop up, and the
            upload goes on behind it; the next version waits for that.
        metadata: strings for each version's manifest.
        on_report: called with each version's report, once it is known.
        settings: the publisher's other arguments: ``level``, ``key``, ``anchor_every``, ``observer``, ...

    A store that fails for longer than the publisher's ``retry_s`` does not end the training: the version stays pending
    and goes out with the next one, that step's own version is left out, and a warning is logged. :meth:`flush` raises.

    Raises:
        MisuseError: ``every`` is less than 1, or ``adapters`` is no such word.
        ConflictError: (any call) another publisher writes to this store.
    """

    def __init__(
        self,
        store: str | Store,
        *,
        every: int = 1,
        dtype: torch.dtype | None = torch.bfloat16,
        adapters: Adapters = "alone",
        sharded: bool = False,
        wait: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_report: Callable[[PublishReport], object] | None = None,
        **settings: Any,
    ) -> None:
        if every < 1:
            raise MisuseError(f"every must be 1 or more, not {every}")
        if adapters not in ("alone", "merged"):
            raise MisuseError(f"adapters must be 'alone' or 'merged', not {adapters!r}")
        self.every, self.dtype, self.adapters, self.wait, self.sharded = every, dtype, adapters, wait, sharded
        self.metadata, self.on_report = dict(metadata or {}), on_report
        self.report: PublishReport | None = None
        self.last_step: int | None = None
        self._store, self._settings = store, settings
        self._publisher: Publisher | ShardedPublisher | None = None
        self._future: Future[PublishReport] | None = None

    @property
    def publisher(self) -> Publisher | ShardedPublisher:
        """The publisher, made when it is first asked for."""
        if self._publisher is None:
            kind = ShardedPublisher if self.sharded else Publisher
            self._publisher = kind(self._store, dtype=self.dtype, **self._settings)
        return self._publisher

    def step(self, model: torch.nn.Module, step: int) -> None:
        """After optimiser step ``step``: publish if it is this one's turn and has not been yet."""
        if step % self.every == 0 and step != self.last_step:
            self.publish(model, step)

    def publish(self, model: torch.nn.Module, step: int) -> None:
        """Publish now."""
        whole = not self.sharded
        with state_to_publish(model, adapters=self.adapters, dtype=self.dtype, whole=whole) as state:
            if self.sharded or not dist.is_initialized() or dist.get_rank() == 0:
                self._send(state, step)
        self.last_step = step

    def _send(self, state: State, step: int) -> None:
        metadata = {**self.metadata, **state.metadata}
        try:
            self._settle()
            if self.wait:
                self._note(self.publisher.publish(state.tensors, step=step, metadata=metadata))
            else:
                self._future = self.publisher.publish(state.tensors, step=step, metadata=metadata, wait=False)
        except RetryError as error:
            _log.warning("the store fails, training goes on; what is pending goes out later (step %d): %s", step, error)

    def _settle(self) -> None:
        """Take the report of the version under way; wait for it first, as the publisher would."""
        future, self._future = self._future, None
        if future is not None:
            try:
                self._note(future.result())
            except RetryError:
                found = self.publisher.flush()
                if found is not None:
                    self._note(found)

    def _note(self, report: PublishReport) -> None:
        self.report = report
        if self.on_report is not None:
            self.on_report(report)

    def flush(self) -> PublishReport | None:
        """Wait for the version under way, trying again if it failed; the newest report.

        Raises:
            RetryError: the store still fails. What is pending stays so.
        """
        self._settle()
        found = None if self._publisher is None else self._publisher.flush()
        if found is not None and found != self.report:
            self._note(found)
        return self.report

    def after(self, optimizer: Any, model: torch.nn.Module, *, step: int = 0) -> RemovableHandle:
        """Publish by itself after ``optimizer``'s steps, counted from ``step``, until the handle is removed.

        The optimiser may be one that Accelerate has prepared. Where fp32 masters are copied to bf16 weights after the
        step, call :meth:`step` by hand instead: this would come too early.
        """
        taken = step

        def publish(*_: Any) -> None:
            nonlocal taken
            taken += 1
            self.step(model, taken)

        return plain_optimizer(optimizer).register_step_post_hook(publish)


def log_values(report: PublishReport, prefix: str = "publish/") -> dict[str, float]:
    """A version's numbers for loggers.

    >>> import thinwire
    >>> report = thinwire.Publisher("memory://doc-log-values").publish(torch.nn.Linear(4, 4))
    >>> log_values(report)["publish/version"]
    1.0
    """
    return {
        f"{prefix}version": float(report.version),
        f"{prefix}bytes": float(report.total_bytes),
        f"{prefix}density": report.density,
        f"{prefix}seconds": report.seconds["total"],
    }

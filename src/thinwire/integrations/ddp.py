"""Compressed data parallel: a communication hook for PyTorch's DistributedDataParallel.

    exchange = CompressedAllReduce(ErrorFeedback(TopK(density=0.01)))
    ddp_model.register_comm_hook(exchange, CompressedAllReduce.hook)

The exchange runs in a thread of its own, over a process group of its own, while backward computes the next buckets.
"""

# No "from __future__ import annotations" here: DDP reads the annotations of a hook as types.
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from thinwire.aggregate.base import Aggregator, Reading
from thinwire.aggregate.weights import Weighting
from thinwire.compress.base import Compressor, State
from thinwire.compress.group import Group
from thinwire.compress.schedule import Schedule
from thinwire.errors import MisuseError, ThinwireError
from thinwire.integrations.exchange import Exchange, LayerBudget, Traffic, reshard
from thinwire.integrations.process_group import TorchGroup
from thinwire.integrations.reduction import Mode

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim import Optimizer

__all__ = ["CompressedAllReduce", "LayerBudget", "Traffic"]

_log = logging.getLogger(__name__)


@final
class CompressedAllReduce:
    """A DDP communication hook that sends compressed gradients. Making one is collective: ranks that were given unlike
    compressors or options all raise here, before anything is trained.

    Args:
        compressor: what to send, usually ``ErrorFeedback(TopK(...))``. None sends everything.
        group: the ranks, as DDP's ``process_group`` (default: all). A group of its own is made over them.
        mode: how sparse updates are reduced (:mod:`thinwire.compress.allreduce`): ``split`` costs the same at any
            number of ranks; ``gather`` suits 2 or 3; ``shared`` lets one rank after the other choose for all, the
            cheapest; ``mask`` uses one set of positions, found by ``split``, for 16 steps on end; ``dense`` sends
            everything; ``auto`` takes the quickest of split, gather and dense for every bucket, by a model
            calibrated on the first step.
        aggregate: how many gradients become one. A weighting, such as
            :class:`~thinwire.aggregate.SignalWeighted`, gives every worker a weight by how good its gradients are, from
            what :meth:`observe` is told and what the gradients show; it goes with any compressor. An aggregator, such
            as :class:`~thinwire.aggregate.CoordinateMedian`, looks at whole gradients, without a compressor and once
            backward has ended. Default: the mean.
        schedule: a density over time; it overrides the compressor's. Feed it with :meth:`observe`.
        layer_budget: shares the elements due over the parameters; without, those of a bucket compete.
        scaler: the GradScaler of mixed-precision training. Residuals are kept in true units, and a step that it skips
            leaves them untouched.
        optimizer: the optimiser, for its learning rates: where they change, what waits in the residual is rescaled, so
            that it is applied at the rate of its time.
        rollback: keep the residual of the step before until it is known to be good, at 4 bytes a parameter. Default:
            with a scaler.
        unused_parameters: the model has parameters that get no gradient in some steps, as DDP's
            ``find_unused_parameters`` allows; what waits for them is not sent in those (:meth:`attach` sees to it).
        together_mb: buckets are added to what waits as backward delivers them, and exchanged together once they come
            to so many MiB of float32, or with the last one. The rounds of an exchange, not its bytes, are what small
            buckets pay for; less begins earlier, and overlaps more with a long backward.
        timeout_s: after which a rank that does not answer is an error on all others.

    Raises:
        MisuseError: The ranks differ, or torch.distributed is not initialised.

    Errors of an exchange surface in ``backward()`` (PyTorch wraps them in a RuntimeError that names them);
    :attr:`error` has the original. The group is then of no use; restart from a checkpoint.

    What is sent is the gradient of the step (summed over micro-batches that ran under ``no_sync``). For Adam-like
    optimisers see :class:`thinwire.integrations.local_steps.LocalSteps`.
    """

    def __init__(
        self,
        compressor: Compressor | None = None,
        *,
        group: dist.ProcessGroup | Group | None = None,
        aggregate: Weighting | Aggregator | None = None,
        mode: Mode = "auto",
        schedule: Schedule | None = None,
        layer_budget: LayerBudget | None = None,
        scaler: "GradScaler | None" = None,
        optimizer: "Optimizer | None" = None,
        rollback: bool | None = None,
        unused_parameters: bool = False,
        together_mb: float = 128.0,
        timeout_s: float = 60.0,
    ) -> None:
        self._group = _joined(group, timeout_s)
        self._optimizer = optimizer
        self._together = inf if isinstance(aggregate, Aggregator) else together_mb * (1 << 20) / 4
        self._waiting: list[tuple[Any, Tensor]] = []  # futures of buckets that have been added
        self._names: dict[int, str] = {}
        self._parameters: dict[str, Tensor] = {}  # holds on to them, so that an id stays one parameter's
        self._exchange = Exchange(
            compressor,
            self._group,
            mode=mode,
            schedule=schedule,
            layer_budget=layer_budget,
            scaler=scaler,
            rollback=rollback,
            unused_parameters=unused_parameters,
            aggregate=aggregate,
            learning_rate_of=self._learning_rate if optimizer is not None else None,
            weight_of=self._parameters.__getitem__,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="thinwire-exchange")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._priming = False
        self.error: BaseException | None = None

    # --- DDP -------------------------------------------------------------------------------------------------------

    @staticmethod
    def hook(exchange: "CompressedAllReduce", bucket: GradBucket) -> Future[Tensor]:
        """What ``register_comm_hook`` takes. Parameters are told apart by the order in which DDP first shows them;
        :meth:`attach` knows their names."""
        parameters = bucket.parameters()
        keys = [exchange._key_of(parameter) for parameter in parameters]
        shapes = [tuple(parameter.shape) for parameter in parameters]
        flat = bucket.buffer()
        if exchange._priming:
            done: Future[Tensor] = Future()
            done.set_result(flat)
            return done
        return exchange._start(flat, keys, shapes, last=bucket.is_last())

    def attach(self, model: "DistributedDataParallel") -> "CompressedAllReduce":
        """Registers the hook on a DDP model and keeps its parameters by name, so that a saved state fits whatever
        buckets and order DDP chooses. Returns itself."""
        for name, parameter in model.module.named_parameters():
            self._know(parameter, name)
        self._exchange.unused_parameters |= bool(model.find_unused_parameters)
        model.register_comm_hook(self, CompressedAllReduce.hook)
        return self

    def prime(self, model: torch.nn.Module, closure: Callable[[], Any]) -> None:
        """One forward and backward (``closure``) whose gradients are thrown away, nothing being exchanged.

        DDP forms its final buckets after its first backward. For a resumed run to be bit-exact it must start with
        them: prime first, then load the checkpoint (forward changes random states and BatchNorm's buffers).
        """
        self._priming = True
        try:
            closure()
        finally:
            self._priming = False
        model.zero_grad(set_to_none=True)

    # --- without DDP -----------------------------------------------------------------------------------------------

    def all_reduce(
        self,
        tensor: Tensor,
        name: str = "flat",
        *,
        parts: Mapping[str, tuple[int, ...]] | None = None,
        given: State | None = None,
    ) -> Tensor:
        """Replaces a floating-point ``tensor`` by its mean over the ranks and returns it; residuals are kept under
        ``name``. Blocks; collective.

        A tensor that holds many parameters end to end names them with their shapes in ``parts``: residuals are then
        kept by parameter, and compressors see the matrices. ``given`` is added to the compressor's state for this call
        alone (what :class:`~thinwire.compress.visible.VisibleTopK` refers to).
        """
        shapes = {name: tuple(tensor.shape)} if parts is None else dict(parts)
        try:
            self._start(tensor.view(-1), list(shapes), list(shapes.values()), given, last=True).wait()
        except RuntimeError as error:  # as a future wraps it
            if isinstance(self.error, ThinwireError):
                raise self.error from None
            raise error
        return tensor

    def observe(
        self,
        *,
        loss: float | Tensor | None = None,
        tokens: float | Tensor | None = None,
        improvement: float | Tensor | None = None,
    ) -> None:
        """What this rank knows of its step, once for each micro-batch and before its backward: its loss, for schedules
        and weights that follow it; the tokens that the loss is a mean over, where ranks have unlike numbers of them;
        the improvement that its gradient made on a held-out batch. Losses and improvements are averaged over a step's
        micro-batches, tokens are added up."""
        for name, value in (("loss", loss), ("tokens", tokens), ("improvement", improvement)):
            if value is not None:
                number = float(value.detach() if isinstance(value, Tensor) else value)
                self._in_thread(partial(self._exchange.observe, name, number))

    def refer_to(self, gradients: Mapping[str, Tensor]) -> None:
        """The gradient of a batch that is trusted, by the names of the parameters, for signals that compare with it;
        until another is given. Give all ranks the same."""
        self._in_thread(partial(self._exchange.refer_to, gradients))

    @property
    def weights(self) -> Tensor | None:
        """Every rank's weight in the last step, float64 ``[P]``, on the CPU; None where ``aggregate`` is no weighting.
        A linear aggregator's are its coefficients (the last one the previous result's, where it uses that)."""
        if self._exchange.weigher:
            return self._exchange.weigher.weights
        return self._exchange.regions.coefficients if self._exchange.regions else None

    @property
    def readings(self) -> list[dict[str, Reading]]:
        """For every rank, what its signals said in the last step, by name."""
        weigher = self._exchange.weigher
        if not weigher:
            return []
        names = [signal.name for signal in weigher.weighting.signals]
        return [dict(zip(names, row, strict=True)) for row in weigher.readings]

    @property
    def group(self) -> Group:
        """The ranks; for other messages between two exchanges."""
        return self._group

    @property
    def scaled(self) -> bool:
        """Whether what comes by is scaled by a GradScaler, or rescaled where learning rates change."""
        return self._exchange.scaler is not None or self._optimizer is not None

    @property
    def traffic(self) -> Traffic:
        """Bytes so far, by the collectives' own accounting."""
        return self._exchange.traffic()

    @property
    def density(self) -> float | None:
        """The density of the current step; None for a compressor without one."""
        return getattr(self._exchange.reduction.compressor, "density", None)

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals and all else that the next step depends on; save one for each rank. Collective."""
        state: dict[str, Any] = self._in_thread(self._exchange.state_dict)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict` of the same rank, number of ranks and compressor.

        Raises:
            MisuseError: It is of another; :meth:`reshard` makes states for another number of ranks.
        """
        self._in_thread(lambda: self._exchange.load_state_dict(state))

    @staticmethod
    def reshard(states: Sequence[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
        """The states of all ranks of a run, for another number of ranks. The mean residual stays what it was."""
        return reshard(states, world_size)

    def close(self) -> None:
        """Ends the thread and the process group. The exchange is of no use afterwards."""
        self._thread.shutdown(wait=True)
        if isinstance(self._group, TorchGroup) and dist.is_initialized():
            self._group.close()

    # --- the thread ------------------------------------------------------------------------------------------------

    def _start(
        self, flat: Tensor, keys: list[str], shapes: list[tuple[int, ...]], given: State | None = None, *, last: bool
    ) -> Future[Tensor]:
        device = flat.device
        future: Future[Tensor] = Future(devices=[device]) if device.type == "cuda" else Future()
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._thread.submit(self._run, flat, keys, shapes, given, last, ready, future)
        return future.then(self._unwrap)

    def _run(
        self,
        flat: Tensor,
        keys: list[str],
        shapes: list[tuple[int, ...]],
        given: State | None,
        last: bool,
        ready: Any,
        future: Any,
    ) -> None:
        self._waiting.append((future, flat))
        with self._stream(flat.device, ready), torch.no_grad():
            try:
                if self.error is not None:
                    raise self.error
                self._exchange.add(flat, keys, shapes, given)
                if not last and self._exchange.pending_numel < self._together:
                    return
                self._exchange.flush()
            except BaseException as error:  # whatever it is must reach backward, not die with this thread
                if self.error is None:
                    _log.error("the exchange failed: %s", error)
                self.error = error
            waiting, self._waiting = self._waiting, []
            for done, result in waiting:
                done.set_result(result)

    def _stream(self, device: torch.device, ready: Any) -> Any:
        if device.type != "cuda":
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_event(ready)
        return torch.cuda.stream(stream)

    def _unwrap(self, future: Future[Tensor]) -> Tensor:
        if self.error is not None:
            if isinstance(self.error, ThinwireError):
                raise self.error
            raise RuntimeError(f"the gradient exchange failed: {self.error!r}") from self.error
        return future.value()

    def _in_thread(self, work: Callable[[], Any]) -> Any:
        return self._thread.submit(work).result()

    # --- parameters ------------------------------------------------------------------------------------------------

    def _key_of(self, parameter: Tensor) -> str:
        name = self._names.get(id(parameter))
        return self._know(parameter, f"#{len(self._names)}") if name is None else name

    def _know(self, parameter: Tensor, name: str) -> str:
        self._names[id(parameter)] = name
        self._parameters[name] = parameter
        return name

    def _learning_rate(self, key: str) -> float:
        assert self._optimizer is not None
        wanted = self._parameters.get(key)
        for group in self._optimizer.param_groups:
            if any(parameter is wanted for parameter in group["params"]):
                return float(group["lr"])
        if len(self._optimizer.param_groups) == 1:
            return float(self._optimizer.param_groups[0]["lr"])
        raise MisuseError(f"parameter {key} is not in the optimiser's groups; pass the optimiser of this model")


def _joined(group: dist.ProcessGroup | Group | None, timeout_s: float) -> Group:
    if group is None or isinstance(group, dist.ProcessGroup):
        return TorchGroup(group, timeout_s)
    return group

"""One optimisation step on all workers: rates, mixed precision, accumulation, and the exchange of gradients.

A recipe gives a model and, for each step, the parts of its batch and a loss; it never sees the rest. Everything that
the next step depends on goes into two states: what all workers share, and what is each worker's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thinwire.errors import MalformedError
from thinwire.integrations.ddp import CompressedAllReduce
from thinwire.lab.trainer.aggregation import Standing, make_aggregate, standing
from thinwire.lab.trainer.compression import compressor_of, schedule_of
from thinwire.lab.trainer.faults import Fault, PastWeights
from thinwire.lab.trainer.options import TrainingOptions
from thinwire.lab.trainer.schedule import learning_rate
from thinwire.lab.trainer.workers import Workers

__all__ = ["Bytes", "Learner", "Step", "make_optimizer"]

Part = TypeVar("Part")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Bytes:
    """Gradient payload of one worker. ``dense`` is what it would have received uncompressed, in float32, by a ring
    all-reduce: ``2 (P - 1) / P`` of the gradient."""

    received: int = 0
    sent: int = 0
    dense: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.received + other.received, self.sent + other.sent, self.dense + other.dense)

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.received - other.received, self.sent - other.sent, self.dense - other.dense)


@dataclass(frozen=True, slots=True)
class Step:
    """What happened in one step, as this worker saw it; ``loss`` is the mean over its own batch."""

    loss: float
    lr: float
    density: float
    bytes: Bytes
    seconds: float


class Learner:
    """A model in training. ``model`` stays usable as it is; gradients flow through DDP where there are workers.

    ``step`` numbers count from 0 and the learning rate follows from them, so no schedule has a state. Without
    compression gradients go through DDP's own all-reduce, and ``received`` and ``sent`` are its ring's by computation;
    with it they are the exchange's own accounting. ``past`` is the largest delay of a :class:`Fault` that may come.

    Raises:
        MisuseError: the workers were started with different options.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TrainingOptions,
        workers: Workers,
        *,
        steps: int,
        warmup_steps: int,
        past: int = 0,
    ) -> None:
        self.model = model
        self._options, self._workers = options, workers
        self._steps, self._warmup_steps = steps, warmup_steps
        self.optimizer = make_optimizer(model, options)
        device = workers.device.type
        self._scaler = torch.amp.GradScaler(device, enabled=options.precision == "float16")
        self._past = PastWeights(model, past) if past else None
        self._aggregate: Any = make_aggregate(options)
        self._ddp: DistributedDataParallel | None = None
        self._exchange: CompressedAllReduce | None = None
        self._before = Bytes()
        if workers.size > 1:
            self._connect()
            self._before = self.bytes  # what it took to connect is no step's

    def _connect(self) -> None:
        options, device = self._options, self._workers.device
        ids = [device.index] if device.type == "cuda" else None
        self._ddp = DistributedDataParallel(self.model, device_ids=ids, bucket_cap_mb=options.bucket_mb)
        compressor = compressor_of(options)
        if compressor is not None or self._aggregate is not None:
            self._exchange = CompressedAllReduce(
                compressor,
                mode=options.mode,  # type: ignore[arg-type]
                schedule=schedule_of(options),
                scaler=self._scaler if self._scaler.is_enabled() else None,
                optimizer=self.optimizer,
                timeout_s=options.timeout_s,
                **({} if self._aggregate is None else {"aggregate": self._aggregate}),
            ).attach(self._ddp)
        weights = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        self._ring_bytes = 2 * (self._workers.size - 1) * 4 * weights // self._workers.size
        self._plain = Bytes()

    def close(self) -> None:
        """End the exchange's thread."""
        if self._exchange is not None:
            self._exchange.close()

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision asked for, for a forward."""
        dtype = _DTYPES[self._options.precision]
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._workers.device.type, dtype)

    # --- learning --------------------------------------------------------------------------------------------------

    def step(
        self,
        number: int,
        parts: Sequence[Part],
        loss_of: Callable[[nn.Module, Part], Tensor],
        fault: Fault = Fault(),  # noqa: B008, it is frozen
    ) -> Step:
        """Learn from a batch, given as ``parts`` of equal size; ``loss_of`` gives the mean loss of one.

        Gradients are exchanged once, with the last part. ``fault`` is what this worker's has.
        """
        started = time.perf_counter()
        lr = learning_rate(self._options, number, self._steps, self._warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with nullcontext() if self._past is None else self._past.step(fault.delay):
            loss = self._backward(parts, loss_of, fault.sign)
        density = self._density()  # the exchange moves it as a step begins
        if self._options.clip_norm:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._options.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        value = float(loss)  # waits for the device, so that the time is that of the whole step
        if self._ddp is not None:
            self._plain += Bytes(self._ring_bytes, self._ring_bytes, self._ring_bytes)
        now = self.bytes
        moved, self._before = now - self._before, now
        return Step(value, lr, density, moved, time.perf_counter() - started)

    def _backward(
        self, parts: Sequence[Part], loss_of: Callable[[nn.Module, Part], Tensor], sign: float = 1.0
    ) -> Tensor:
        """Gradients of the mean loss over all parts, averaged over the workers; returns that loss of this one."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._workers.device)
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            alone = self._ddp.no_sync() if self._ddp is not None and not last else nullcontext()
            with alone:
                with self.autocast():
                    loss = loss_of(self.model if self._ddp is None else self._ddp, part) / len(parts)
                total += loss.detach()
                if last and self._exchange is not None and self._observes:
                    self._exchange.observe(loss=total)
                scaled: Tensor = self._scaler.scale(loss * sign)
                torch.autograd.backward(scaled)
        return total

    @property
    def _observes(self) -> bool:
        """Whether the exchange follows the loss; on a GPU, telling it waits for the forward."""
        return self._aggregate is not None or self._options.density_warmup_steps > 0

    def _density(self) -> float:
        found = self._exchange.density if self._exchange is not None else None
        return 1.0 if found is None else found

    @property
    def standing(self) -> Standing:
        """What each worker counted for in the last step, and why."""
        return standing(self._exchange, self._workers.size)

    @property
    def bytes(self) -> Bytes:
        """Gradient payload since this object was made."""
        if self._ddp is None:
            return Bytes()
        if self._exchange is None:
            return self._plain
        traffic = self._exchange.traffic
        return Bytes(traffic.received_bytes, traffic.sent_bytes, traffic.dense_bytes)

    # --- states ----------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """What is the same on all workers (of BatchNorm's buffers, rank 0's count)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def own_state(self) -> dict[str, Any]:
        """What is this worker's: random states, and what compression has held back."""
        cuda = self._workers.device.type == "cuda"
        return {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self._workers.device) if cuda else None,
            "exchange": self._exchange.state_dict() if self._exchange is not None else None,
            "past": None if self._past is None else self._past.state(),
            "pending": astuple(self.bytes - self._before),  # of what state_dict() had to settle
        }

    def load(
        self,
        shared: dict[str, Any],
        own: Sequence[dict[str, Any]],
        part: Part,
        loss_of: Callable[[nn.Module, Part], Tensor],
    ) -> None:
        """Go on from the states of all workers of a checkpoint; a run of as many workers goes on bit for bit.

        DDP cuts gradients into other buckets in its first step than in all later ones. So one step is made on ``part``
        and thrown away first; then everything is loaded, since a forward also moves random states and buffers.

        Raises:
            MalformedError: the checkpoint is not one of this model and optimiser.
        """
        if self._ddp is not None:
            if self._exchange is None:
                self._backward([part], loss_of)
                self.optimizer.zero_grad(set_to_none=True)
            else:
                self._exchange.prime(self._ddp, lambda: torch.autograd.backward(loss_of(self._ddp, part)))  # type: ignore[arg-type]
        rank, size = self._workers.rank, self._workers.size
        self._before = self.bytes
        try:
            self.model.load_state_dict(shared["model"])
            self.optimizer.load_state_dict(shared["optimizer"])
            self._scaler.load_state_dict(shared["scaler"])
            if self._exchange is not None and own[0]["exchange"] is not None:
                states = [x["exchange"] for x in own]
                states = states if len(states) == size else CompressedAllReduce.reshard(states, size)
                self._exchange.load_state_dict(states[rank])
            if len(own) == size:
                self._before -= Bytes(*own[rank]["pending"])
                torch.set_rng_state(own[rank]["rng"])
                if self._past is not None and own[rank].get("past") is not None:
                    self._past.load(own[rank]["past"])
                if own[rank]["cuda_rng"] is not None and self._workers.device.type == "cuda":
                    torch.cuda.set_rng_state(own[rank]["cuda_rng"], self._workers.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise MalformedError(f"the checkpoint does not fit this run: {error}") from error


def make_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters that learn; those of fewer than two dimensions (biases, norms) do not decay."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.peak_lr)
    return torch.optim.SGD(groups, lr=options.peak_lr, momentum=options.momentum, nesterov=options.nesterov)

"""What others do, run by PyTorch's own code wherever it has it: all-reduce, the fp16 hook, the PowerSGD hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from thinwire.bench.gradients_exchange import FLOAT, Exchange, Method, count, numel_of, ring, selected
from thinwire.bench.gradients_workload import Bucket
from thinwire.tensors.select import accumulate_top_k

__all__ = ["PEERS", "AllGatherTopK", "Hook", "NoOp"]

_POWERSGD_STARTS = 2  # PyTorch wants two dense steps before error feedback


def _done(result: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(result)
    return future


def _in_order(by_bucket: dict[int, Tensor]) -> Tensor | None:
    return torch.cat([by_bucket[i].view(-1) for i in sorted(by_bucket)]) if by_bucket else None


class Hook(Exchange):
    """A hook of PyTorch's own, with its state."""

    def __init__(
        self,
        hook: Callable[[Any, Any], torch.futures.Future[Tensor]],
        state: object = None,
        *,
        one_by_one: bool = False,
    ) -> None:
        self._hook, self._state, self.one_by_one = hook, state, one_by_one

    def hook(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        return self._hook(self._state, bucket)

    def residual(self) -> Tensor | None:
        return _in_order(getattr(self._state, "error_dict", {}))


class NoOp(Exchange):
    """Nothing is exchanged: what the harness itself costs."""

    def hook(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        return _done(bucket.buffer())


class AllGatherTopK(Exchange):
    """Everybody's k largest to everybody: int32 indices, float32 values, error feedback (Aji & Heafield 2017).

    Selection is ours, exact and several times faster than ``torch.topk``, so that the wire is what is compared.
    """

    def __init__(self, density: float) -> None:
        self._density = density
        self._residuals: dict[int, Tensor] = {}
        self._received = 0

    def hook(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        flat, ranks = bucket.buffer(), dist.get_world_size()
        residual = self._residuals.setdefault(bucket.index(), torch.zeros_like(flat))
        indices = accumulate_top_k(flat, residual, count(flat.numel(), self._density)).indices
        values = residual[indices]
        residual[indices] = 0
        everyone = [[torch.empty_like(part) for _ in range(ranks)] for part in (indices, values)]
        sent = [
            dist.all_gather(into, part, async_op=True) for into, part in zip(everyone, (indices, values), strict=True)
        ]
        self._received += (ranks - 1) * (indices.nbytes + values.nbytes)

        def decode(_: object) -> Tensor:
            flat.zero_()
            for theirs, what in zip(*everyone, strict=True):
                flat.index_add_(0, theirs, what, alpha=1 / ranks)
            return flat

        return torch.futures.collect_all([work.get_future() for work in sent]).then(decode)

    def residual(self) -> Tensor | None:
        return _in_order(self._residuals)

    def received_bytes(self) -> int | None:
        return self._received


def _power_sgd(rank: int) -> Exchange:
    """One bucket at a time: the hook's callbacks start all-reduces of their own, and with several buckets in flight
    gloo neither keeps them in the same order on all ranks nor has threads enough to wait for them."""
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=rank, start_powerSGD_iter=_POWERSGD_STARTS, use_error_feedback=True,
        warm_start=True, compression_stats_logging_frequency=1 << 30,
    )  # fmt: skip
    return Hook(powerSGD_hook.powerSGD_hook, state, one_by_one=True)


def _power_sgd_bytes(rank: int) -> Callable[[int, Sequence[Bucket], float], float]:
    def theory(ranks: int, buckets: Sequence[Bucket], density: float) -> float:
        del density
        total = 0
        for shape in (gradient.shape for bucket in buckets for gradient in bucket.gradients()):
            rows, columns = shape[0], prod(shape[1:])
            factors = min(rank, rows, columns) * (rows + columns)
            total += factors if len(shape) > 1 and 2 * factors < rows * columns else rows * columns
        return ring(ranks, FLOAT * total)

    return theory


PEERS = (
    Method("noop", "no-op", lambda _: NoOp(), lambda _p, _b, _d: 0.0),
    Method(
        "fp32", "fp32 all-reduce", lambda _: Hook(default_hooks.allreduce_hook),
        lambda p, b, _: ring(p, FLOAT * numel_of(b)),
    ),
    Method(
        "fp16", "fp16 hook", lambda _: Hook(default_hooks.fp16_compress_hook),
        lambda p, b, _: ring(p, 2 * numel_of(b)), lossy=2**-11,
    ),
    Method("powersgd-1", "PowerSGD hook, rank 1", lambda _: _power_sgd(1), _power_sgd_bytes(1)),
    Method("powersgd-2", "PowerSGD hook, rank 2", lambda _: _power_sgd(2), _power_sgd_bytes(2)),
    Method(
        "allgather", "all-gather top-k", AllGatherTopK,
        lambda p, b, d: (p - 1) * selected(b, d) * 2 * FLOAT,
    ),
)  # fmt: skip

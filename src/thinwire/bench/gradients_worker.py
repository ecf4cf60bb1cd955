"""One rank of ``thinwire bench gradients``: verify a method, then time it, method after method.

Verified are the first steps of the very exchange that is timed afterwards. Without error feedback, every step's result
must be the mean of all ranks' gradients, in float32 to within rounding, in float16 to within its rounding. With error
feedback, nothing may get lost: ``sum(applied) + mean(residual) == sum(true)`` to within float32 rounding. Both are
checked at :data:`CHECKED` positions drawn anew for each run (all, if there are fewer). And every rank must hold the
same bits: it delivers digests of its whole result, which the launching process compares.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from blake3 import blake3
from torch import Tensor

from thinwire.bench.gradients_exchange import Exchange, Method, exchange_all
from thinwire.bench.gradients_methods import METHODS
from thinwire.bench.gradients_workload import Workload, resnet50_shapes
from thinwire.bench.net.launch import deliver

__all__ = ["CHECKED", "GradientOptions", "main"]

CHECKED = 1 << 17
"""Positions at which results are compared with the truth."""

_ROUNDINGS = 8  # float32 roundings that one value may go through in one step, beside one for each rank
_HALF_STEP = 2.0**-25  # what rounding may take from a float16 so small that its precision is absolute

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GradientOptions:
    """What is exchanged, how, and how often. ``width`` is that of ResNet-50's first layer, 64 in the real one."""

    methods: tuple[str, ...]
    density: float = 0.01
    repeats: int = 7
    verified_steps: int = 4
    bucket_mb: float = 25.0
    width: int = 64
    seed: int = 0
    timeout_s: float = 300.0

    def dumps(self) -> str:
        """As one argument of a worker."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> GradientOptions:
        """What :meth:`dumps` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "methods": tuple(fields["methods"])})


@contextmanager
def joined(timeout_s: float) -> Iterator[None]:
    """The group of all ranks, left in step: gloo aborts a process that ends while others still talk to it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _line() -> tuple[int, int] | None:
    """Bytes received and sent by this host's line; None on loopback, which counts all ranks as one."""
    if (name := os.environ["GLOO_SOCKET_IFNAME"]) == "lo":
        return None
    received, sent = (Path(f"/sys/class/net/{name}/statistics/{way}_bytes").read_text() for way in ("rx", "tx"))
    return int(received), int(sent)


def _mean_over_ranks(values: Tensor) -> Tensor:
    """In float64, ranks added in order: the truth that results are compared with."""
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    return torch.stack(everyone).double().mean(0)


def _rounding() -> float:
    """Relative error that float32 may bring into one step."""
    return (dist.get_world_size() + _ROUNDINGS) * 2.0**-24


class _Verifier:
    """Follows the first steps of one exchange at some positions."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._workload = workload
        generator = torch.Generator().manual_seed(seed + 77)
        positions = torch.unique(torch.randint(workload.numel, (CHECKED,), generator=generator))
        self._at = torch.arange(workload.numel) if workload.numel <= CHECKED else positions
        self._true = torch.zeros(len(self._at), dtype=torch.float64)
        self._applied = torch.zeros_like(self._true)
        self._size = torch.zeros_like(self._true)
        self._step_error = 0.0
        self.digests: list[str] = []
        self._steps = 0

    def before(self) -> None:
        mine = self._workload.flat[self._at]
        self._mean, self._mean_size = _mean_over_ranks(mine), _mean_over_ranks(mine.abs())

    def after(self, lossy: float) -> None:
        """``lossy``: relative error of a rounding on the wire; every rank's addend goes through two and a sum."""
        result = self._workload.flat[self._at].double()
        self._true += self._mean
        self._applied += result
        self._size += self._mean_size
        self._steps += 1
        addends = dist.get_world_size() + 1
        bound = self._mean_size * (addends * lossy + _rounding()) + (addends * _HALF_STEP if lossy else 0.0) + 1e-30
        self._step_error = max(self._step_error, float(((result - self._mean).abs() / bound).max()))
        self.digests.append(blake3(self._workload.flat.view(torch.uint8).numpy().data, max_threads=1).hexdigest())

    def law(self, exchange: Exchange) -> Row:
        """How far from the truth, in units of what rounding allows: at most 1."""
        residual = exchange.residual()
        if residual is None:
            return {"law": "mean", "error": self._step_error}
        kept = residual[self._at]
        difference = self._applied + _mean_over_ranks(kept) - self._true
        bound = (self._size + _mean_over_ranks(kept.abs())) * self._steps * _rounding() + 1e-30
        return {"law": "applied + residual", "error": float((difference.abs() / bound).max())}


def _timed_step(exchange: Exchange, workload: Workload) -> Row:
    dist.barrier()
    line, own = _line(), exchange.received_bytes()
    cpu, began = time.process_time(), time.perf_counter()
    exchange_all(exchange, workload.buckets)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    dist.barrier()  # what this rank still sends to others belongs to this step
    now, after = _line(), exchange.received_bytes()
    return {
        "seconds": seconds,
        "cpu_s": cpu_seconds,
        "received": now[0] - line[0] if line and now else None,
        "sent": now[1] - line[1] if line and now else None,
        "own": None if own is None or after is None else after - own,
    }


def measure(method: Method, workload: Workload, options: GradientOptions) -> Row:
    """Verification and timing of one method on this rank."""
    exchange = method.make(options.density)
    try:
        verifier = _Verifier(workload, options.seed)
        for step in range(options.verified_steps):
            workload.fill(step)
            if method.name != "noop":
                verifier.before()
            exchange_all(exchange, workload.buckets)
            if method.name != "noop":
                verifier.after(method.lossy)
        checks = {"law": "none", "error": 0.0} if method.name == "noop" else verifier.law(exchange)
        steps: list[Row] = []
        for step in range(options.verified_steps, options.verified_steps + options.repeats):
            workload.fill(step)
            gc.collect()
            steps.append(_timed_step(exchange, workload))
        return {
            "method": method.name,
            "steps": steps,
            "checks": checks,
            "digests": verifier.digests,
            "theory_bytes": method.theory(dist.get_world_size(), workload.buckets, options.density),
            "numel": workload.numel,
            "buckets": [bucket.buffer().numel() for bucket in workload.buckets],
        }
    finally:
        exchange.close()


def main(arguments: Sequence[str]) -> None:
    """``python -m thinwire.bench.gradients_worker OPTIONS``, started by :func:`thinwire.bench.net.launch.launch`."""
    options = GradientOptions.loads(arguments[0])
    torch.set_num_threads(1)
    with joined(options.timeout_s):
        rank = dist.get_rank()
        workload = Workload(resnet50_shapes(options.width), options.bucket_mb, rank, options.seed)
        results = []
        for name in options.methods:
            if rank == 0:
                print(METHODS[name].title)
            results.append(measure(METHODS[name], workload, options))
    deliver(results)


if __name__ == "__main__":
    main(sys.argv[1:])

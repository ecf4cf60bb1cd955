"""The processes of a run: one, or as many as ``torchrun`` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from thinwire.errors import MisuseError
from thinwire.lab.trainer.options import TrainingOptions

__all__ = ["Workers", "joined"]


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among ``size``: its ``rank``, and the ``device`` on which it computes.

    Without a process group ``size`` is 1, and every collective answers at once.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one process that prints and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        self.sums([0.0])  # on any device and backend, unlike dist.barrier, which guesses NCCL's device

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the workers, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(x) for x in total.tolist()]

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every worker's ``values`` (as many on each), by rank, in float64."""
        if self.size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        all_of_them = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(all_of_them, own)
        return [[float(x) for x in row.tolist()] for row in all_of_them]

    def told_by_first(self, text: str) -> str:
        """Rank 0's ``text``, on all."""
        told = [text]
        if self.size > 1:
            dist.broadcast_object_list(told, src=0, device=self.device)
        return told[0]

    def copy_buffers(self, model: torch.nn.Module) -> None:
        """Take rank 0's buffers (BatchNorm's running statistics), as DDP does before each forward."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    @contextmanager
    def one_after_the_first(self) -> Iterator[None]:
        """Rank 0 enters first, the others when it has left: it fills a cache, they read it."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()


@contextmanager
def joined(options: TrainingOptions) -> Iterator[Workers]:
    """The workers of this run. A process group is used if there is one, else made and closed again.

    ``torchrun`` says how many there are (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``); a process without it is alone.

    Raises:
        MisuseError: a device or backend was asked for that is not here, there are more workers than GPUs, or several
            workers were asked for and nobody started them.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(options, local)
    if dist.is_initialized():
        yield Workers(dist.get_rank(), dist.get_world_size(), device)
        return
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" not in os.environ and options.workers > 1:
        raise MisuseError(
            f"{options.workers} workers are asked for, and this is one process; start it by thinwire train or torchrun"
        )
    if size == 1:
        yield Workers(0, 1, device)
        return
    wait = timedelta(seconds=options.timeout_s)
    dist.init_process_group(_backend(options, device), rank=rank, world_size=size, timeout=wait)
    try:
        yield Workers(rank, size, device)
    finally:
        dist.destroy_process_group()


def _device(options: TrainingOptions, local: int) -> torch.device:
    if options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MisuseError("there is no CUDA device here; use --device cpu")
    if local >= torch.cuda.device_count():
        raise MisuseError(
            f"worker {local} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many workers "
            "as GPUs, or use --device cpu",
            local=local,
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _backend(options: TrainingOptions, device: torch.device) -> str:
    backend = options.backend
    if backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and (device.type != "cuda" or not dist.is_nccl_available()):
        raise MisuseError("nccl carries gradients between GPUs only; use --backend gloo here")
    return backend

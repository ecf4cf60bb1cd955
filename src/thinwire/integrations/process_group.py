"""Ranks of torch.distributed as a :class:`~thinwire.compress.group.Group`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.errors import MisuseError, RetryError, first_line

__all__ = ["TorchGroup"]


@final
class TorchGroup:
    """A process group of its own over the same ranks, so that no collective of the caller's can come in between.

    Making one is collective over ``parent`` (default: all ranks). With gloo, messages go through the CPU, so tensors on
    a GPU work there too; with NCCL they stay on the GPU.

    Raises:
        MisuseError: torch.distributed has not been initialised.
        RetryError: A verb failed or did not complete within ``timeout_s``; the group is of no use any more.
    """

    def __init__(self, parent: dist.ProcessGroup | None = None, timeout_s: float = 60.0) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise MisuseError("call torch.distributed.init_process_group() first; torchrun sets up what it needs")
        self._timeout_s = timeout_s
        self._rank = dist.get_rank(parent)
        self._size = dist.get_world_size(parent)
        self._received = 0
        self._sent = 0
        backend = dist.get_backend(parent)
        # "cpu:gloo,cuda:nccl" and plain "nccl" carry GPU tensors; anything else is fed from the CPU.
        self._device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
        if parent is None:
            self._group = dist.new_group(timeout=timedelta(seconds=timeout_s), backend=backend)
        else:
            self._group = dist.new_group(
                dist.get_process_group_ranks(parent),
                timeout=timedelta(seconds=timeout_s),
                backend=backend,
                use_local_synchronization=True,
            )

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def received_bytes(self) -> int:
        return self._received

    @property
    def sent_bytes(self) -> int:
        return self._sent

    def all_to_all(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        mine = outgoing[self._rank]
        if self._size == 1:
            return [mine]
        away = [part.numel() if r != self._rank else 0 for r, part in enumerate(outgoing)]
        message = torch.cat([part for r, part in enumerate(outgoing) if r != self._rank])
        parts = self._swap(message, away, incoming, mine.device)
        parts[self._rank] = mine
        return parts

    def all_gather(self, data: Tensor, incoming: Sequence[int]) -> list[Tensor]:
        if self._size == 1:
            return [data]
        away = [data.numel() if r != self._rank else 0 for r in range(self._size)]
        parts = self._swap(data.repeat(self._size - 1), away, incoming, data.device)
        parts[self._rank] = data
        return parts

    def all_reduce_(self, values: Tensor) -> None:
        if self._size == 1:
            return
        staged = values.to(self._device)
        try:
            dist.all_reduce(staged, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        if staged is not values:
            values.copy_(staged)
        ring = 2 * values.nbytes * (self._size - 1) // self._size
        self._received += ring
        self._sent += ring

    def close(self) -> None:
        dist.destroy_process_group(self._group)

    def _swap(self, message: Tensor, away: list[int], incoming: Sequence[int], device: torch.device) -> list[Tensor]:
        due = [size if r != self._rank else 0 for r, size in enumerate(incoming)]
        got = torch.empty(sum(due), dtype=torch.uint8, device=self._device)
        try:
            dist.all_to_all_single(got, message.to(self._device), due, away, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        self._received += sum(due)
        self._sent += sum(away)
        return list(torch.split(got.to(device), due))

    def _lost(self, error: RuntimeError) -> RetryError:
        reason = first_line(error)
        return RetryError(
            f"rank {self._rank} lost the others during an exchange: one died, or did not answer within "
            f"{self._timeout_s:g} s ({reason}); start all ranks again from the last checkpoint",
            rank=self._rank,
        )

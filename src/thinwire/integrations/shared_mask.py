"""Data parallel over one set of positions: with :class:`thinwire.optim.ASPG`, ranks exchange what will be stepped.

    optimizer = ASPG(model.parameters(), density=0.01, refresh_every=100)
    shared = SharedMask(optimizer)
    ddp_model.register_comm_hook(shared, SharedMask.hook)

Between two selections ASPG looks at the gradients of its active cells only. All ranks hold the same ones, chosen from
the same averaged gradient, so that their values travel by a dense all-reduce without positions: ``k`` numbers instead
of ``n``. In a step that selects, everything is averaged.
"""

# No "from __future__ import annotations" here: DDP reads the annotations of a hook as types.
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from thinwire.errors import MisuseError
from thinwire.optim.aspg import ASPG
from thinwire.optim.flat import flat_pair

__all__ = ["SharedMask"]


@final
class SharedMask:
    """A DDP communication hook that averages the gradients that ``optimizer`` will use, and zeroes all others.

    Replicas stay equal, bit for bit, as long as they begin equal and all ranks step: the set follows from what all have
    in common. After a step that is skipped on all ranks nothing has changed. Clipping by the norm sees the averaged
    cells alone between selections.

    Args:
        optimizer: of the parameters of the DDP model, without error feedback, which needs whole gradients. Parameters
            that it does not have are averaged whole.
        group: the ranks, as DDP's ``process_group`` (default: all).

    Attributes:
        payload_bytes: what has been given to all-reduce so far. A ring receives ``2 (P - 1) / P`` of it a rank.
        dense_bytes: what would have been without this.

    Raises:
        MisuseError: torch.distributed is not initialised, or a group of the optimiser has error feedback.
    """

    def __init__(self, optimizer: ASPG, *, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise MisuseError("call torch.distributed.init_process_group() first; torchrun sets up what it needs")
        if any(g["error_feedback"] for g in optimizer.param_groups):
            raise MisuseError("error feedback needs whole gradients; use CompressedAllReduce, which keeps its own")
        self.optimizer, self.group = optimizer, group
        self.payload_bytes = self.dense_bytes = 0

    @staticmethod
    def hook(shared: "SharedMask", bucket: GradBucket) -> Future[Tensor]:
        """What ``register_comm_hook`` takes."""
        flat, size = bucket.buffer(), dist.get_world_size(shared.group)
        parts = [shared._part(p, g) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)]
        sparse = any(positions is not None for _, positions in parts)
        message = torch.cat([_taken(*part) for part in parts]) if sparse else flat
        message.div_(size)
        shared.payload_bytes += message.numel() * message.element_size()
        shared.dense_bytes += flat.numel() * flat.element_size()
        work: Any = dist.all_reduce(message, group=shared.group, async_op=True)

        def deliver(_: Future[Any]) -> Tensor:
            if sparse:
                flat.zero_()
                sizes = [len(g) if positions is None else len(positions) for g, positions in parts]
                for (g, positions), values in zip(parts, message.split(sizes), strict=True):  # type: ignore[no-untyped-call]
                    if positions is None:
                        g.copy_(values)
                    else:
                        g.index_copy_(0, positions, values)
            return flat

        found: Future[Tensor] = work.get_future().then(deliver)
        return found

    def _part(self, p: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """A parameter's gradient in the order of its memory [n], and the positions int64 of it that are needed."""
        _, flat = flat_pair(p.detach(), gradient)
        if flat.data_ptr() != gradient.data_ptr():
            raise MisuseError("DDP lays out a gradient unlike its parameter; make the parameter contiguous")
        positions = self.optimizer.needed(p)
        return flat, None if positions is None else positions.long()


def _taken(gradient: Tensor, positions: Tensor | None) -> Tensor:
    return gradient if positions is None else gradient.index_select(0, positions)

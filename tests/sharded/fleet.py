"""A trainer of several ranks in threads, that holds slices of one whole state; and readers that hold slices, too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from tests.sharded.test_chunking import Spec, held
from tests.sharded.threads import ranks, together
from thinwire.stores import Store
from thinwire.sync.pending import PublishReport
from thinwire.sync.sharded_publisher import ShardedPublisher
from thinwire.sync.shards import Slice
from thinwire.wire.chunks import Box

State = dict[str, torch.Tensor]


def cut(whole: torch.Tensor, box: Box) -> Slice:
    """A copy of a box of a tensor, as a shard."""
    return Slice(whole[box.slices()].clone(), box.offsets, tuple(whole.shape))


def shards(state: State, spec: Spec, rank: int, size: int) -> dict[str, Slice]:
    boxes = {name: held(spec[name][1], tuple(tensor.shape), rank, size) for name, tensor in state.items()}
    return {name: cut(state[name], box) for name, box in boxes.items() if box is not None}


class Trainer:
    """``size`` ranks that publish what :data:`Spec` says each of them holds."""

    def __init__(self, store: Store, size: int, spec: Spec, **options: Any) -> None:
        self.size, self.spec = size, spec
        options = {"threads": 1, "retry_s": 0.2, **options}
        self.ranks = ranks(size)
        self.publishers = [ShardedPublisher(store, group=rank, **options) for rank in self.ranks]

    def publish(self, state: State, step: int | None = None, **options: Any) -> PublishReport:
        works = [
            partial(self.publishers[rank].publish, shards(state, self.spec, rank, self.size), step=step, **options)
            for rank in range(self.size)
        ]
        reports = together(works)
        assert len({(report.version, report.digest, report.total_bytes) for report in reports}) == 1
        return reports[0]


def moved(state: Mapping[str, torch.Tensor], seed: int, share: float = 0.05) -> State:
    """The state with some elements changed, to neighbours, to zeros of the other sign, and to NaN."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in state.items():
        new = tensor.clone()
        flat = new.view(-1)
        where = torch.rand(flat.numel(), generator=generator) < share
        if new.is_floating_point():
            flat[where] = flat[where] * 1.01
            if flat.numel() > 2 and seed % 3 == 0:
                flat[0], flat[1] = -0.0, float("nan")
        else:
            flat[where] += 1
        found[name] = new
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same_bits(shards: Mapping[str, Slice], state: State) -> bool:
    return all(
        bits(item.tensor) == bits(state[name][Box(tuple(item.offsets), tuple(item.tensor.shape)).slices()])
        for name, item in shards.items()
    )


def empty_like(items: Mapping[str, Slice]) -> dict[str, Slice]:
    return {name: Slice(torch.zeros_like(item.tensor), item.offsets, item.shape) for name, item in items.items()}

"""Chains of either kind behind one publisher: whole versions, and versions in parts, of several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

import thinwire
from tests.sharded.fleet import cut
from tests.sharded.test_chunking import held
from tests.sharded.threads import ranks, together
from thinwire.sync.pending import PublishReport
from thinwire.sync.sharded_publisher import ShardedPublisher
from thinwire.sync.shards import Slice

KINDS = ("rows", "columns", "replicated", "grid", "rows", "one rank")


class Parts:
    """Ranks in threads that hold slices of what is published: by rows, columns or both, whole, or on one rank alone."""

    def __init__(self, store: Any, size: int, **options: Any) -> None:
        self.size = size
        made = ranks(size)
        self.publishers = [ShardedPublisher(store, group=rank, threads=1, **options) for rank in made]

    def publish(self, weights: Mapping[str, torch.Tensor], **how: Any) -> PublishReport:
        works = [
            partial(publisher.publish, self._held(weights, rank), **how)
            for rank, publisher in enumerate(self.publishers)
        ]
        return together(works)[0]

    def _held(self, weights: Mapping[str, torch.Tensor], rank: int) -> dict[str, Slice]:
        """A rank's slices; tied tensors stay tied."""
        found: dict[str, Slice] = {}
        cuts: dict[object, Slice | None] = {}
        for k, (name, tensor) in enumerate(weights.items()):
            memory = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name
            if memory not in cuts:
                box = held(KINDS[k % len(KINDS)], tuple(tensor.shape), rank, self.size)
                cuts[memory] = None if box is None else cut(tensor, box)
            mine = cuts[memory]
            if mine is not None:
                found[name] = mine
        return found


CHAINS = {"whole": thinwire.Publisher, "of 2 ranks": partial(Parts, size=2), "of 4 ranks": partial(Parts, size=4)}

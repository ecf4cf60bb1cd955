"""What a reader of a part of a sharded model fetches, by the sharding of trainer and reader: bytes, and no times.

Four ranks (threads of this process) train one model in bf16, of whose elements 1 % change by one unit in the last place
(simulated). Every reader's cells are compared with the trainer's before anything is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import torch

from thinwire.stores.memory import MemoryStore
from thinwire.sync.chunking import GROUP_CELLS
from thinwire.sync.pending import PublishReport
from thinwire.sync.sharded_consumer import ShardedConsumer
from thinwire.sync.sharded_publisher import ShardedPublisher
from thinwire.sync.shards import Slice

__all__ = ["measure"]

Shapes = dict[str, tuple[int, ...]]
READERS = (
    "whole",
    "rows, 1 of 4",
    "columns, 1 of 4",
    "tensor parallel, 1 of 4",
    "tensor parallel, 1 of 3",
    "layers, 1 of 4",
)


class _Ranks:
    """Threads that gather."""

    def __init__(self, rank: int, room: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._room, self._barrier = rank, len(room), room, barrier

    def gather(self, value: Any) -> list[Any]:
        self._room[self.rank] = value
        self._barrier.wait()
        found = list(self._room)
        self._barrier.wait()
        return found


def shapes_of(layers: int, width: int) -> Shapes:
    """Tensors of a transformer: attention and MLP of each layer, embeddings, norms."""
    found: Shapes = {"embed": (4 * width, width), "norm": (width,)}
    for k in range(layers):
        found |= {
            f"layers.{k:02d}.qkv": (3 * width, width), f"layers.{k:02d}.o": (width, width),
            f"layers.{k:02d}.up": (4 * width, width), f"layers.{k:02d}.down": (width, 4 * width),
            f"layers.{k:02d}.norm": (width,),
        }  # fmt: skip
    return found


def _slice(tensor: torch.Tensor, d: int, k: int, of: int) -> Slice:
    step = -(-tensor.shape[d] // of)
    start, stop = min(k * step, tensor.shape[d]), min((k + 1) * step, tensor.shape[d])
    offsets = tuple(start if axis == d else 0 for axis in range(tensor.dim()))
    return Slice(tensor.narrow(d, start, stop - start).clone(), offsets, tuple(tensor.shape))


def _shards(state: Mapping[str, torch.Tensor], kind: str) -> dict[str, Slice]:
    """What a reader of this kind holds; ``rows, k of 4`` also what a trainer's rank does."""
    name, _, share = kind.partition(", ")
    k, of = (int(word) for word in share.split(" of ")) if share else (1, 1)
    found = {}
    for tensor_name, tensor in state.items():
        if name == "layers" and not tensor_name.startswith("layers.") and tensor_name != "norm":
            continue
        if name == "layers" and "." in tensor_name and int(tensor_name.split(".")[1]) % of != k - 1:
            continue
        d = 1 if name == "columns" or (name == "tensor parallel" and tensor_name.endswith((".o", ".down"))) else 0
        alone = name in ("whole", "layers") or (tensor.dim() == 1 and name != "rows")
        found[tensor_name] = _slice(tensor, 0 if alone else d, 0 if alone else k - 1, 1 if alone else of)
    return found


def _nudged(state: Mapping[str, torch.Tensor], density: float, seed: int) -> dict[str, torch.Tensor]:
    rng, found = np.random.default_rng(seed), {}
    for name, tensor in state.items():
        bits = tensor.clone().view(torch.int16).numpy()
        flat = bits.reshape(-1)
        where = rng.random(flat.size) < density
        flat[where] += rng.choice(np.array([-1, 1], np.int16), int(where.sum()))
        found[name] = torch.from_numpy(bits).view(torch.bfloat16).reshape(tensor.shape)
    return found


def measure(
    *,
    layers: int = 8,
    width: int = 768,
    density: float = 0.01,
    ranks: int = 4,
    level: str = "small",
    slices: Sequence[int] = (1, 4, 8),
    group_cells: Sequence[int] = (GROUP_CELLS,),
) -> Iterator[dict[str, Any]]:
    """One row for each of ``slices``, ``group_cells`` and kinds of reader; every reader's cells are compared."""
    generator = torch.Generator().manual_seed(0)
    first = {n: (0.02 * torch.randn(s, generator=generator)).bfloat16() for n, s in shapes_of(layers, width).items()}
    second = _nudged(first, density, 1)
    for cut, cells in product(slices, group_cells):
        store = MemoryStore()
        report = _publish(store, ranks, cut, cells, level, [first, second])
        trees = sum(info.size for info in store.list("objects/0000000002") if info.key.endswith("tree.json"))
        for kind in READERS:
            yield {
                "bench": "sharded", "layers": layers, "width": width, "density": density, "level": level,
                "slices": cut, "group_cells": cells, "ranks": ranks, "reader": kind, "state_bytes": report.full_bytes,
                "changed": report.changed, "patch_bytes": report.patch_bytes, "tree_bytes": trees,
                **_read(store, kind, first, second),
            }  # fmt: skip


def _publish(
    store: MemoryStore, ranks: int, slices: int, cells: int, level: str, states: list[dict[str, torch.Tensor]]
) -> PublishReport:
    room: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks, timeout=600)

    def work(rank: int) -> PublishReport:
        group = _Ranks(rank, room, barrier)
        publisher = ShardedPublisher(store, group=group, slices=slices, group_cells=cells, level=level, threads=1)
        return [publisher.publish(_shards(state, f"rows, {rank + 1} of {ranks}")) for state in states][-1]

    with ThreadPoolExecutor(ranks) as pool:
        return next(iter(list(pool.map(work, range(ranks)))))


def _read(
    store: MemoryStore, kind: str, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    wanted = _shards(second, kind)
    mine = {name: Slice(torch.zeros_like(item.tensor), item.offsets, item.shape) for name, item in wanted.items()}
    consumer = ShardedConsumer(store, partial=True, threads=1)
    loaded = consumer.load(mine, version=1)
    before = _shards(first, kind)
    assert all(torch.equal(mine[name].tensor, item.tensor) for name, item in before.items())
    version = consumer.poll()
    assert version is not None
    applied = version.apply(mine)
    assert applied.path == "delta"
    for name, item in wanted.items():
        assert torch.equal(mine[name].tensor.view(torch.int16), item.tensor.view(torch.int16)), (kind, name)
    own = sum(item.tensor.numel() * item.tensor.element_size() for item in wanted.values())
    return {
        "reader_bytes": own, "load_bytes": loaded.bytes_fetched, "delta_bytes": applied.bytes_fetched,
        "share_bytes": consumer.share_bytes, "beside_bytes": consumer.beside_bytes,
    }  # fmt: skip

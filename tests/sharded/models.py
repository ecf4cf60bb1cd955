"""What the ranks of a process group do in the tests: FSDP2 and tensor-parallel models, trained and served for real."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from thinwire.errors import ThinwireError
from thinwire.stores.local import LocalStore
from thinwire.sync import sharded_publisher
from thinwire.sync.sharded_consumer import ShardedConsumer
from thinwire.sync.sharded_publisher import ShardedPublisher


class Block(nn.Module):
    """Sizes that four ranks cannot share evenly, but for those that tensor parallelism cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 40)
        self.down = nn.Linear(40, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """With a tied head, biases shorter than there are ranks, and buffers: one of no dimensions, one empty."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 3)
        self.again = self.head
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("nothing", torch.empty(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fsdp(model: Net, mesh: DeviceMesh) -> Net:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def tensor_parallel(model: Net, mesh: DeviceMesh) -> Net:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def train(model: Net, step: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    model(x.to(next(model.parameters()).dtype)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.steps += 1


def whole(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = full.detach().to(dtype).clone() if dtype and full.is_floating_point() else full.detach().clone()
    return found


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        digest.update(name.encode() + str((tensor.dtype, tuple(tensor.shape))).encode() + raw)
    return digest.hexdigest()


def publisher_of(folder: str, **options: Any) -> ShardedPublisher:
    store = LocalStore(Path(folder))
    return ShardedPublisher(store, dtype=torch.bfloat16, threads=1, retry_s=20, anchor_ratio=100, **options)


def consumer_of(folder: str, **options: Any) -> ShardedConsumer:
    return ShardedConsumer(LocalStore(Path(folder)), threads=1, retry_s=20, **options)


def train_and_serve(folder: str) -> dict[str, Any]:
    """FSDP2 over four ranks trains and publishes; tensor parallelism over the same four follows."""
    mesh = init_device_mesh("cpu", (4,))
    model = fsdp(Net(), mesh)
    publisher = publisher_of(folder)
    first = publisher.publish(model, step=0)
    served = tensor_parallel(Net(seed=9).bfloat16(), mesh)
    consumer = consumer_of(folder, group=dist.group.WORLD)
    consumer.load(served)
    same = [fingerprint(whole(served)) == fingerprint(whole(model, torch.bfloat16))]
    for step in (1, 2):
        train(model, step)
        publisher.publish(model, step=step)
        version = consumer.poll()
        assert version is not None
        result = version.apply(served)
        assert result.path == "delta"
        same.append(fingerprint(whole(served)) == fingerprint(whole(model, torch.bfloat16)))
    return {
        "first": first.kind, "same": same, "print": fingerprint(whole(model, torch.bfloat16)),
        "keys": len(list(publisher.store.list("objects/0000000002"))),
    }  # fmt: skip


def go_on(folder: str, kind: str) -> dict[str, Any]:
    """Another job: other ranks and meshes load what is there, train on, and publish."""
    size = dist.get_world_size()
    model = Net(seed=3)
    if kind == "fsdp":
        model = fsdp(model, init_device_mesh("cpu", (size,)))
    elif kind == "hsdp":
        model = fsdp(model, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "fsdp and tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("shard", "tp"))
        model = fsdp(tensor_parallel(model, mesh["tp"]), mesh["shard"])
    model = model.bfloat16()
    consumer = consumer_of(folder)
    consumer.load(model)
    loaded = fingerprint(whole(model))
    publisher = publisher_of(folder)
    same = publisher.publish(model, step=10)
    train(model, 11)
    last = publisher.publish(model, step=11)
    own = publisher_of(folder).publish(model, step=12)  # a new start on the same mesh takes the model for its base
    return {
        "loaded": loaded, "unchanged": same.changed, "kinds": [same.kind, last.kind, own.kind],
        "print": fingerprint(whole(model)), "version": own.version, "again": own.changed,
    }  # fmt: skip


def die(folder: str, before: str) -> dict[str, Any]:
    """Rank 3 is killed while a version is on its way; the others are told."""
    model = fsdp(Net(), init_device_mesh("cpu", (dist.get_world_size(),)))
    publisher = publisher_of(folder)
    report = publisher.publish(model, step=0)
    train(model, 1)
    if dist.get_rank() == 3:
        upload = sharded_publisher.upload

        def last_upload(*args: Any, **how: Any) -> None:
            if before == "commit":
                upload(*args, **how)
            os._exit(9)

        setattr(sharded_publisher, "upload", last_upload)  # noqa: B010 - in this process, which ends by it
    try:
        publisher.publish(model, step=1)
    except ThinwireError as error:
        return {"error": type(error).__name__, "version": report.version}
    return {"error": "", "version": 0}

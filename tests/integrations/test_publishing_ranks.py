"""Publishing from several processes: DDP's replicas, FSDP2's shards. Process 0 publishes, whole tensors, once."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinwire
from tests.integrations.pool import RankPool
from thinwire.integrations.publishing import Publishing

Sums = dict[str, list[float]]


class Net(nn.Module):
    """Odd sizes, so that shards are padded; input and output share their weights; a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 7)
        self.block = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7))
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embed(tokens)
        out: Tensor = self.head(hidden + self.block(hidden))
        return out.logsumexp(-1).mean()


def train(wrapped: nn.Module, store: str, *, steps: int = 3, sharded: bool = False) -> int:
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    publishing = Publishing(store, dtype=None, every=2, sharded=sharded)
    publishing.publish(wrapped, 0)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        wrapped(torch.arange(11)).backward()
        optimizer.step()
        publishing.step(wrapped, step)
    publishing.publish(wrapped, steps)
    report = publishing.flush()
    return 0 if report is None else report.version


def with_ddp(store: str) -> int:
    return train(nn.parallel.DistributedDataParallel(Net()), store)


def with_shards(store: str) -> int:
    return with_fsdp2(store, sharded=True)


def with_fsdp2(store: str, *, sharded: bool = False) -> int:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = Net(), init_device_mesh("cpu", (2,))
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, store, sharded=sharded)


def with_sharded_adapter(store: str) -> list[str]:
    import peft
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from thinwire.errors import MisuseError

    model: Any = peft.get_peft_model(Net().block, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    publishing = Publishing(store, dtype=torch.bfloat16, wait=True)
    publishing.publish(model, 0)
    try:
        Publishing(store, adapters="merged").publish(model, 1)
    except MisuseError as error:
        return [str(error)]
    return []


def expected(steps: int = 3) -> dict[str, Tensor]:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(11)).backward()
        optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("work", [with_ddp, with_fsdp2])
def test_process_0_publishes_whole_tensors(work: Any, ranks: RankPool, tmp_path: Path) -> None:
    store = str(tmp_path / uuid.uuid4().hex)
    assert ranks.run(2, work, store, timeout_s=240) == [3, 0]
    model = Net()
    consumer = thinwire.Consumer(store)
    assert consumer.load(model).step == 3
    assert consumer.fetch().aliases == {"head.weight": "embed.weight"}
    for name, tensor in expected().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_every_process_publishes_its_shards(ranks: RankPool, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    assert ranks.run(2, with_shards, store, timeout_s=240) == [3, 3]
    model = Net()
    assert thinwire.ShardedConsumer(store).load(model).step == 3
    for name, tensor in expected().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_a_sharded_adapter_is_gathered_but_not_merged(ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    store = str(tmp_path / "store")
    said = ranks.run(2, with_sharded_adapter, store, timeout_s=240)
    assert all("publish it alone" in text for texts in said for text in texts)
    assert all(said)
    layouts = thinwire.Consumer(store).fetch().layouts
    assert {name: layout.shape for name, layout in layouts.items()} == {
        f"base_model.model.{k}.lora_{m}.weight": shape
        for k, a, b in (("0", (2, 7), (5, 2)), ("2", (2, 5), (7, 2)))
        for m, shape in (("A", a), ("B", b))
    }
    assert {layout.dtype.name for layout in layouts.values()} == {"BF16"}

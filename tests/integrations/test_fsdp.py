"""FSDP2 with compressed replicas: 2 x 2 processes shard inside a row and exchange between rows."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.integrations.pool import RankPool
from thinwire.compress import ErrorFeedback, TopK
from thinwire.errors import MisuseError
from thinwire.integrations.agreement import digest_of, local
from thinwire.integrations.ddp import CompressedAllReduce
from thinwire.integrations.fsdp import compress_replicas
from thinwire.integrations.local_steps import LocalSteps

UNITS = ("(root)", "blocks.0", "blocks.1")


class Net(nn.Module):
    """Odd sizes, so that shards are padded; two blocks and parameters of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)])
        self.head = nn.Linear(9, 5)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor, with_unused: bool = True) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x)) + x
        out = self.head(x).square().mean()
        return out + self.unused(x[:, :3]).square().mean() if with_unused else out


def plain(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def two_by_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def sharded(mesh: DeviceMesh, seed: int = 0, **options: Any) -> Net:
    model = plain(seed)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def exchange_over(mesh: DeviceMesh, compressed: bool) -> CompressedAllReduce:
    compressor = ErrorFeedback(TopK(0.05)) if compressed else None
    return CompressedAllReduce(compressor, group=mesh["replicate"].get_group(), mode="gather" if compressed else "auto")


def batch(step: int) -> Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(100 * dist.get_rank() + step))


def backward(model: nn.Module, step: int, **how: Any) -> Tensor:
    model.zero_grad()
    loss = model(batch(step), **how)
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: local(p.grad).double() for name, p in model.named_parameters() if p.grad is not None}


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if isinstance(p.grad, DTensor)}


# --- everything is sent ----------------------------------------------------------------------------------------------


def without_compression() -> tuple[list[float], tuple[str, ...]]:
    mesh = two_by_two()
    model = sharded(mesh["shard"])
    exchange = exchange_over(mesh, compressed=False)
    units = compress_replicas(model, exchange)
    native, alone = sharded(mesh), plain()
    for each in (model, native, alone):
        backward(each, 0)
    apart = []
    for name, p in alone.named_parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)
        apart += [float((got - p.grad / 4).abs().max()) for got in (whole(model)[name], whole(native)[name])]
    exchange.close()
    return apart, units


def test_without_compression_it_is_hybrid_sharding(ranks: RankPool) -> None:
    for apart, units in ranks.run(4, without_compression):
        assert units == UNITS
        assert max(apart) < 1e-6


# --- little is sent --------------------------------------------------------------------------------------------------


def residuals(model: Net, exchange: CompressedAllReduce) -> dict[str, Tensor]:
    """What waits, by parameter: a unit's buffer holds its parameters' shards end to end, padded to the first's size."""
    saved = exchange.state_dict()["parameters"]
    assert set(saved) == set(UNITS)
    waiting = {}
    for unit in UNITS:
        owned = {n: p for n, p in model.named_parameters() if _unit_of(n) == unit}
        flat, start = saved[unit]["residual"].double(), 0
        for name, p in owned.items():
            shard = local(p)
            padded = -(-p.shape[0] // 2) * p[0].numel()
            assert not flat[start + shard.numel() : start + padded].any(), "padding is never anything"
            waiting[name] = flat[start : start + shard.numel()].view_as(shard)
            start += padded
        assert start == flat.numel()
    return waiting


def _unit_of(name: str) -> str:
    return name.rsplit(".", 1)[0] if name.startswith("blocks") else "(root)"


def with_top_k() -> dict[str, Any]:
    mesh = two_by_two()
    model, other = sharded(mesh["shard"]), sharded(mesh["shard"])
    exchange = exchange_over(mesh, compressed=True)
    compress_replicas(model, exchange)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    applied = {name: torch.zeros_like(local(p)).double() for name, p in model.named_parameters()}
    true = {name: torch.zeros_like(value) for name, value in applied.items()}
    losses = []
    for step in range(25):
        with torch.no_grad():
            for mine, its in zip(model.parameters(), other.parameters(), strict=True):
                local(its).copy_(local(mine))
        losses.append(float(backward(model, step)))
        backward(other, step)  # this replica's gradient, before the hook
        for name, value in gradients(model).items():
            applied[name] += value
        for name, value in gradients(other).items():
            dist.all_reduce(value, group=mesh["replicate"].get_group())
            true[name] += value / 2
        optimizer.step()
    apart, waits = [], 0.0
    for name, value in residuals(model, exchange).items():
        dist.all_reduce(value, group=mesh["replicate"].get_group())
        apart.append(float((applied[name] + value / 2 - true[name]).abs().max()))
        waits = max(waits, float(value.abs().max()))
    traffic = exchange.traffic
    found = {"losses": losses, "apart": apart, "waits": waits, "digest": digest_of(model.parameters())}
    exchange.close()
    return {**found, "bytes": (traffic.received_bytes, traffic.dense_bytes)}


def test_nothing_is_lost_replicas_stay_equal_and_learn(ranks: RankPool) -> None:
    found = ranks.run(4, with_top_k)
    for each in found:
        assert max(each["apart"]) < 1e-6 < each["waits"]
        assert sum(each["losses"][-5:]) < 0.5 * sum(each["losses"][:5])
        assert each["bytes"][0] < 0.5 * each["bytes"][1]
    assert found[0]["digest"] == found[2]["digest"] != found[1]["digest"] == found[3]["digest"]


def resumed() -> tuple[str, str]:
    mesh = two_by_two()

    def fresh() -> tuple[Net, CompressedAllReduce, torch.optim.Optimizer]:
        model, exchange = sharded(mesh["shard"]), exchange_over(mesh, compressed=True)
        compress_replicas(model, exchange)
        return model, exchange, torch.optim.SGD(model.parameters(), lr=0.1)

    def train(run: tuple[Net, CompressedAllReduce, torch.optim.Optimizer], steps: range) -> Net:
        for step in steps:
            backward(run[0], step)
            run[2].step()
        return run[0]

    straight, first, second = fresh(), fresh(), fresh()
    train(straight, range(8))
    train(first, range(4))
    file = io.BytesIO()
    torch.save(first[1].state_dict(), file)
    file.seek(0)
    second[1].load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for mine, its in zip(second[0].parameters(), first[0].parameters(), strict=True):
            local(mine).copy_(local(its))
    train(second, range(4, 8))
    for run in (straight, first, second):
        run[1].close()
    return digest_of(straight[0].parameters()), digest_of(second[0].parameters())


def test_a_resumed_run_is_the_same_to_the_bit(ranks: RankPool) -> None:
    for straight, again in ranks.run(4, resumed):
        assert straight == again


def in_bf16() -> tuple[str, torch.dtype, list[float], int]:
    """Gradients reduced in bf16, and accumulated over two micro-batches of which only the second is exchanged."""
    mesh = two_by_two()
    model = sharded(mesh["shard"], mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16))
    assert isinstance(model, FSDPModule)
    exchange = exchange_over(mesh, compressed=True)
    compress_replicas(model, exchange)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(20):
        model.zero_grad()
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            loss = model(batch(2 * step + micro)) / 2
            loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    dtype, exchanges = exchange.state_dict()["parameters"]["(root)"]["residual"].dtype, exchange.traffic.exchanges
    exchange.close()
    return digest_of(model.parameters()), dtype, losses, exchanges


def test_gradients_in_bf16_and_accumulated(ranks: RankPool) -> None:
    found = ranks.run(4, in_bf16)
    assert found[0][0] == found[2][0]
    assert found[1][0] == found[3][0]
    for _, dtype, losses, exchanges in found:
        assert dtype == torch.float32
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
        assert exchanges == 20 * len(UNITS)


# --- local steps of sharded replicas ---------------------------------------------------------------------------------


def local_steps() -> tuple[str, str, bool, list[float]]:
    mesh = two_by_two()
    model = sharded(mesh["shard"])
    exchange = exchange_over(mesh, compressed=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    outer = LocalSteps(model, optimizer, exchange, every=4)
    losses, between = [], ""
    for step in range(24):
        losses.append(float(backward(model, step)))
        optimizer.step()
        between = digest_of(model.parameters())
        ended = outer.step()
    after = digest_of(model.parameters())
    exchange.close()
    return between, after, ended, losses


def test_sharded_replicas_can_take_local_steps(ranks: RankPool) -> None:
    found = ranks.run(4, local_steps)
    assert all(ended for _, _, ended, _ in found)
    assert found[0][0] != found[2][0], "in between every replica has its own"
    assert found[0][1] == found[2][1] != found[1][1] == found[3][1]
    assert all(sum(losses[-4:]) < 0.5 * sum(losses[:4]) for *_, losses in found)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def misused() -> dict[str, str]:
    mesh = two_by_two()
    exchange = exchange_over(mesh, compressed=True)
    said = {}

    def refuse(name: str, model: nn.Module) -> None:
        with pytest.raises(MisuseError) as caught:
            compress_replicas(model, exchange)
        said[name] = str(caught.value)

    refuse("plain", plain())
    refuse("native", sharded(mesh))
    refuse("other", sharded(mesh["shard"], seed=dist.get_rank(mesh["replicate"].get_group())))
    with torch.device("meta"):
        empty = nn.Linear(4, 4)
    refuse("meta", fully_shard(empty, mesh=mesh["shard"]))

    model = sharded(mesh["shard"])
    compress_replicas(model, exchange)
    backward(model, 0)
    with pytest.raises((MisuseError, RuntimeError)) as caught:
        backward(model, 1, with_unused=False)
    said["unused"] = str(caught.value)

    model = sharded(mesh["shard"])
    assert isinstance(model, FSDPModule)
    model.set_reduce_scatter_unused_params(True)
    second = exchange_over(mesh, compressed=True)
    compress_replicas(model, second)
    backward(model, 0)
    backward(model, 1, with_unused=False)
    said["exchanges"] = str(second.traffic.exchanges)
    for each in (exchange, second):
        each.close()
    return said


def test_what_cannot_work_is_refused_on_all_ranks(ranks: RankPool) -> None:
    for said in ranks.run(4, misused):
        assert "fully_shard" in said["plain"]
        assert "shard axis alone" in said["native"]
        assert "one seed or checkpoint" in said["other"]
        assert "holds no values" in said["meta"]
        assert "set_reduce_scatter_unused_params" in said["unused"]
        assert said["exchanges"] == str(2 * len(UNITS))

"""The exchange on a GPU: the same answers as on the CPU, and a real DDP whose ranks share one device over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.compress.ranks import together
from tests.integrations.pool import RankPool
from thinwire.compress import (
    BlockTopK,
    Compressor,
    ErrorFeedback,
    Int8,
    LowRank,
    Quantize,
    RandomK,
    Sign,
    Threshold,
    TopK,
)
from thinwire.compress.group import MemoryGroup
from thinwire.integrations.ddp import CompressedAllReduce
from thinwire.integrations.exchange import Exchange

pytestmark = pytest.mark.gpu
N = 300_000


def gradient(rank: int, step: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (torch.randn(N, generator=generator) ** 3).to(device)


def run(compressor: Compressor, mode: str, device: str) -> tuple[list[Tensor], float]:
    """The means of a few steps, and how far they and the mean residual are from the true sum."""

    def work(group: MemoryGroup) -> tuple[list[Tensor], Tensor]:
        exchange = Exchange(ErrorFeedback(compressor), group, mode=mode)  # type: ignore[arg-type]
        means = []
        for step in range(4):
            flat = gradient(group.rank, step, device)
            exchange.reduce_(flat, ["a", "b"], [(N // 3, 2), (N // 3,)])
            means.append(flat)
        parts = exchange.state_dict()["parameters"]
        return means, torch.cat([parts[key]["residual"].view(-1) for key in ("a", "b")])

    results = together(3, work)
    for means, _ in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(means, results[0][0], strict=True))
    true = sum(gradient(r, s, device).double() for r in range(3) for s in range(4)) / 3
    have = sum(m.double() for m in results[0][0]) + sum(r.double() for _, r in results) / 3
    return [m.cpu() for m in results[0][0]], float((have - true).abs().max() / true.abs().max())


@pytest.mark.parametrize(
    ("compressor", "mode"),
    [
        (TopK(0.01), "split"),
        (TopK(0.01, "bfloat16"), "split"),
        (TopK(0.01), "gather"),
        (TopK(0.01), "shared"),
        (TopK(0.01), "auto"),
        (BlockTopK(0.01), "split"),
        (Threshold(0.01), "split"),
        (RandomK(0.01), "auto"),
        (Quantize(Int8()), "auto"),
        (Quantize(Sign()), "auto"),
        (LowRank(2), "auto"),
    ],
    ids=str,
)
def test_a_gpu_keeps_the_law(compressor: Compressor, mode: str) -> None:
    _, worst = run(compressor, mode, "cuda")
    assert worst < 3e-6


@pytest.mark.parametrize("mode", ["split", "gather", "shared"])
def test_a_gpu_gives_the_bits_that_the_cpu_gives(mode: str) -> None:
    on_gpu, _ = run(TopK(0.01, "bfloat16"), mode, "cuda")
    on_cpu, _ = run(TopK(0.01, "bfloat16"), mode, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(on_gpu, on_cpu, strict=True))


def ddp_on_one_device(compressor: Any) -> tuple[float, bytes, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)).cuda()
    exchange = CompressedAllReduce(compressor, mode="split")
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    exchange.attach(ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    loss = torch.zeros(())
    for _ in range(60):
        x = torch.randn(64, 64, generator=generator).cuda()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x), x[:, :10].argmax(1))
        loss.backward()
        optimizer.step()
    traffic = exchange.traffic
    exchange.close()
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return float(loss.detach()), weights, traffic.received_bytes / traffic.dense_bytes


def test_ranks_that_share_a_gpu_train_through_gloo(ranks: RankPool) -> None:
    results = ranks.run(2, ddp_on_one_device, ErrorFeedback(TopK(0.02, "bfloat16"), momentum=0.9))
    assert results[0][1] == results[1][1]
    assert results[0][0] < 1.5
    assert results[0][2] < 0.03

"""Two ranks that exchange active cells only: the steps of plain DDP, bit for bit, for the bytes of those cells."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.pool import RankPool
from thinwire.errors import MisuseError
from thinwire.integrations.shared_mask import SharedMask
from thinwire.optim import ASPG

STEPS, EVERY = 8, 4


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def train(model: nn.Module, optimizer: ASPG, accumulate: bool = False) -> None:
    for step in range(STEPS):
        random = torch.Generator().manual_seed(10 * step + dist.get_rank())
        optimizer.zero_grad()
        if accumulate:
            with model.no_sync():  # type: ignore[operator]
                model(torch.randn(4, 1, 6, 6, generator=random)).square().mean().backward()
        model(torch.randn(4, 1, 6, 6, generator=random)).square().mean().backward()
        optimizer.step()


def work(scope: str, accumulate: bool) -> tuple[list[torch.Tensor], int, int, int, int]:
    torch.set_num_threads(1)
    ends, shared = [], None
    for masked in (False, True):
        model = DistributedDataParallel(network(), bucket_cap_mb=0.005)
        optimizer = ASPG(model.parameters(), lr=1e-2, density=0.1, refresh_every=EVERY, scope=scope)
        if masked:
            shared = SharedMask(optimizer)
            model.register_comm_hook(shared, SharedMask.hook)
        train(model, optimizer, accumulate)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert shared is not None
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(ends[1], network().parameters(), strict=True))
    cells = sum(p.numel() for p in ends[0])
    return ends[1], shared.payload_bytes, shared.dense_bytes, cells, optimizer.active_cells()


@pytest.mark.parametrize(("scope", "accumulate"), [("global", False), ("tensor", True)])
def test_replicas_are_those_of_plain_ddp_for_fewer_bytes(ranks: RankPool, scope: str, accumulate: bool) -> None:
    first, second = ranks.run(2, work, scope, accumulate)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    _, payload, dense, cells, active = first
    selections = STEPS // EVERY
    assert dense == 4 * cells * STEPS
    assert payload == 4 * (cells * selections + active * (STEPS - selections))
    assert payload < 0.4 * dense


def refused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(MisuseError, match="feedback"):
        SharedMask(ASPG([parameter], error_feedback=True))
    optimizer = ASPG([parameter], density=0.5)
    assert optimizer.needed(parameter) is None
    assert optimizer.needed(torch.ones(2)) is None


def test_what_cannot_be_is_refused(ranks: RankPool) -> None:
    with pytest.raises(MisuseError, match="init_process_group"):
        SharedMask(ASPG([nn.Parameter(torch.ones(3))]))
    ranks.run(1, refused)

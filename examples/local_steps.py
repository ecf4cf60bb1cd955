"""Two workers train apart and meet every few steps; one element in twenty of what they moved travels.

python examples/local_steps.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy

from thinwire.compress import ErrorFeedback, TopK
from thinwire.integrations.ddp import CompressedAllReduce
from thinwire.integrations.local_steps import LocalSteps

WORKERS, STEPS, EVERY = 2, 400, 20


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in a box; the label says in which of four rings around its middle they lie."""
    points = torch.rand(128, 8, generator=generator) * 2 - 1
    return points, (points[:, :2].norm(dim=1) * 3).long().clamp(max=3)


def train(rank: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=WORKERS)
    torch.manual_seed(0)  # all start from the same parameters
    model = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(),
                                torch.nn.Linear(256, 4))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    exchange = CompressedAllReduce(ErrorFeedback(TopK(density=0.05)), mode="gather")
    outer = LocalSteps(model, optimizer, exchange, every=EVERY, outer_lr=1.0, outer_momentum=0.0)

    generator = torch.Generator().manual_seed(1 + rank)  # and see different data
    for step in range(1, STEPS + 1):
        points, labels = batch(generator)
        loss = cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if outer.step() and rank == 0 and step % 100 == 0:  # here all workers hold the same model
            with torch.no_grad():
                points, labels = batch(torch.Generator().manual_seed(99))
                held_out = cross_entropy(model(points), labels)
            traffic = exchange.traffic
            every_gradient = traffic.dense_bytes * EVERY
            print(
                f"step {step:>3}: loss {held_out:.3f}, received {traffic.received_bytes:>7,} bytes in "
                f"{traffic.exchanges} meetings (all-reducing every gradient: {every_gradient:,})",
                flush=True,
            )
    exchange.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, args=(str(Path(folder) / "workers"),), nprocs=WORKERS)

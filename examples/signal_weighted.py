"""Three workers, one of whose labels are noise: its weight goes to zero, while those of the others stay equal.

python examples/signal_weighted.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from thinwire.aggregate import LossEMA, SignalWeighted
from thinwire.compress import ErrorFeedback, TopK
from thinwire.integrations.ddp import CompressedAllReduce

WORKERS, STEPS = 3, 200


def train(rank: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=WORKERS)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    ddp_model = DistributedDataParallel(model)

    weighting = SignalWeighted(LossEMA(decay=0.95), warmup=40)  # the defaults are for longer runs
    exchange = CompressedAllReduce(ErrorFeedback(TopK(density=0.05)), aggregate=weighting, mode="split")
    exchange.attach(ddp_model)

    optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.1, momentum=0.9)
    teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(1 + rank)
    for step in range(1, STEPS + 1):
        inputs = torch.randn(64, 64, generator=generator)
        labels = (inputs @ teacher).argmax(1)
        if rank == WORKERS - 1:
            labels = labels[torch.randperm(64, generator=generator)]
        loss = cross_entropy(ddp_model(inputs), labels)
        exchange.observe(loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 40 == 0:
            weights = ", ".join(f"{weight:.3f}" for weight in exchange.weights.tolist())
            losses = ", ".join(f"{row['loss_ema'].value:.2f}" for row in exchange.readings)
            print(f"step {step:>3}: losses {losses}   weights {weights}")
    exchange.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, args=(str(Path(folder) / "workers"),), nprocs=WORKERS)

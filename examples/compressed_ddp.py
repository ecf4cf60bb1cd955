"""Two workers train under DistributedDataParallel; one gradient element in a hundred travels.

python examples/compressed_ddp.py
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

from thinwire.compress import ErrorFeedback, TopK
from thinwire.integrations.ddp import CompressedAllReduce

WORKERS, STEPS = 2, 200


def train(rank: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=WORKERS)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512), torch.nn.ReLU(),
                                torch.nn.Linear(512, 10))  # fmt: skip
    ddp_model = DistributedDataParallel(model)

    exchange = CompressedAllReduce(ErrorFeedback(TopK(density=0.01, values="bfloat16"), momentum=0.9), mode="split")
    exchange.attach(ddp_model)  # or ddp_model.register_comm_hook(exchange, CompressedAllReduce.hook)

    optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.05)  # the momentum is in the exchange
    teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(1 + rank)
    for step in range(1, STEPS + 1):
        inputs = torch.randn(64, 64, generator=generator)
        loss = cross_entropy(ddp_model(inputs), (inputs @ teacher).argmax(1))
        optimizer.zero_grad()
        loss.backward()  # the exchange runs beside it
        optimizer.step()
        if rank == 0 and step % 50 == 0:
            traffic = exchange.traffic
            share = traffic.received_bytes / traffic.dense_bytes
            print(f"step {step:>3}: loss {loss.item():.3f}, received {traffic.received_bytes:>9,} bytes ({share:.1%})")
    exchange.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, args=(str(Path(folder) / "workers"),), nprocs=WORKERS)

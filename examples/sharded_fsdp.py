"""A trainer sharded by FSDP2 publishes shard by shard; tensor-parallel workers and a whole model follow.

torchrun --nproc-per-node 4 examples/sharded_fsdp.py      # or as it is, in one process
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import thinwire


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))


def main() -> None:
    torch.set_num_threads(1)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    shared = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(shared)
    mesh = init_device_mesh("cpu", (size,))

    trained = fully_shard(model(), mesh=mesh)
    publisher = thinwire.ShardedPublisher(shared[0], dtype=torch.bfloat16)  # all ranks of the default group
    publisher.publish(trained, step=0)

    served = parallelize_module(model().bfloat16(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    worker = thinwire.ShardedConsumer(
        shared[0], group=dist.group.WORLD
    )  # its ranks go from version to version together
    worker.load(served)

    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6)
    for step in (1, 2, 3):
        trained(torch.randn(16, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        report = publisher.publish(trained, step=step)
        version = worker.poll()
        assert version is not None
        result = version.apply(served)
        if rank == 0:
            print(
                f"version {report.version}: {report.density:.2%} changed, {report.patch_bytes:,} bytes from {size} "
                f"ranks; a worker's rank fetched {result.bytes_fetched:,}"
            )

    whole = model().bfloat16()
    follower = thinwire.ShardedConsumer(shared[0])
    follower.load(whole)
    mine = {name: tensor.full_tensor().bfloat16() for name, tensor in trained.state_dict().items()}
    assert all(torch.equal(mine[name], tensor) for name, tensor in whole.state_dict().items())
    if rank == 0:
        print(f"a whole model holds version {follower.version}, bit for bit")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

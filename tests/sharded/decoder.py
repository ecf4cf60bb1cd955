"""A decoder's weights as a model that FSDP2 shards and trains, under the names that the engines of the tests load."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.integrations.engines import checkpoint
from tests.sharded.models import publisher_of, whole


class Decoder(nn.Module):
    """Master weights in float32, the output tied to the input; its loss is any function of all weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        known: dict[int, nn.Parameter] = {}
        for name, tensor in checkpoint(seed, dtype=torch.float32).items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, known.setdefault(id(tensor), nn.Parameter(tensor.clone())))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for k, parameter in enumerate(self.parameters()):
            total = total + (parameter * (x + k)).sin().square().mean()
        return total


def publish_in_step(folder: str, versions: int, timeout_s: float) -> dict[str, Any]:
    """Two ranks or more train and publish bf16; each version waits until whoever follows says that he has the last."""
    size = dist.get_world_size()
    model = fully_shard(Decoder(), mesh=init_device_mesh("cpu", (size,)))
    publisher = publisher_of(f"{folder}/store", slices=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    kinds = []
    for version in range(1, versions + 1):
        full = whole(model, torch.bfloat16)
        if dist.get_rank() == 0:
            torch.save(full, f"{folder}/full-{version}.pt")
        kinds.append(publisher.publish(model, step=version).kind)
        end = time.monotonic() + timeout_s
        while not Path(f"{folder}/had-{version}").exists():
            if time.monotonic() > end:
                raise TimeoutError(f"nobody has followed to version {version}")
            time.sleep(0.01)
        model(torch.tensor(float(version))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"kinds": kinds}

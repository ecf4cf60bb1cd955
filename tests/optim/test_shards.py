"""Two ranks of FSDP2: each selects in its own shard, and steps as ASPG does on that shard alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from thinwire.optim import ASPG

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(16, 9)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
fully_shard(model, mesh=mesh)
alone = [torch.nn.Parameter(p.to_local().detach().clone()) for p in model.parameters()]
ours, theirs = ASPG(model.parameters(), lr=0.1, density=0.1), ASPG(alone, lr=0.1, density=0.1)
for step in range(3):
    model(torch.randn(4, 16)).square().sum().backward()
    for p, q in zip(model.parameters(), alone):
        q.grad = p.grad.to_local().clone()
    ours.step()
    theirs.step()
    ours.zero_grad()
assert all(torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), alone))
assert ours.active_cells() == round(0.1 * sum(q.numel() for q in alone)) > 0
dist.destroy_process_group()
print("equal", flush=True)
"""


@pytest.mark.slow
def test_each_rank_steps_its_own_shard(tmp_path: Path) -> None:
    script = tmp_path / "shards.py"
    script.write_text(CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.stdout.split() == ["equal", "equal"], done.stderr

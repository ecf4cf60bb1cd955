"""The local grid against Flower's own simulation on Ray: the same app, the same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys, random, torch
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from tests.federated.apps import initial, ordered, sparse_app
from thinwire.integrations.flower import SparseSync

app = ServerApp()

@app.main()
def main(grid, context):
    sync = SparseSync(ordered(), density=0.1, down_density=0.3, anchor_every=3)
    result = sync.start(grid, initial(), num_rounds=4)
    arrays = {k: a.data for k, a in result.arrays.items()}
    sums = sync.ledger.by("round", "direction", "kind")
    payloads = {str(k): v for k, v in sums.items() if k[2] != "header"}
    torch.save({"arrays": arrays, "payloads": payloads}, sys.argv[1])

config = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
run_simulation(app, sparse_app, num_supernodes=3, backend_config=config)
"""


@pytest.mark.slow
def test_flowers_simulation_gives_the_same_bits(tmp_path):
    from tests.federated.apps import initial, ordered
    from thinwire.integrations.flower import SparseSync
    from thinwire.integrations.flower_grid import LocalGrid

    random.seed(0)
    torch.set_num_threads(1)
    sync = SparseSync(ordered(), density=0.1, down_density=0.3, anchor_every=3)
    ours = sync.start(LocalGrid("tests.federated.apps:sparse_app", 3), initial(), num_rounds=4)

    env = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "out.pt")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "out.pt")
    assert theirs["arrays"] == {name: array.data for name, array in ours.arrays.items()}
    payloads = {str(k): v for k, v in sync.ledger.by("round", "direction", "kind").items() if k[2] != "header"}
    assert theirs["payloads"] == payloads

"""Signal-aware data parallel on rented GPUs (https://modal.com). Needs an account: pip install modal && modal setup

modal run examples/modal_signal.py                               # one training run: 2 workers, one of them corrupted
modal run examples/modal_signal.py --experiment                  # the whole benchmark; rows and figure come back
modal run examples/modal_signal.py --experiment --scenarios all --seeds 5

The text is taken from the folder that THINWIRE_DATA names, if it is set; without it the benchmark generates one.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import modal

ROOT = Path(__file__).resolve().parents[1]
GPUS, CORES, HOURS = 2, 16, 4
IGNORED = ["**/.git", "**/.venv", "**/__pycache__", "**/.*_cache", "out"]

app = modal.App("thinwire-signal")
image = (
    modal.Image.debian_slim(python_version="3.11")
    .add_local_dir(ROOT, "/thinwire", copy=True, ignore=IGNORED)
    .run_commands("pip install --quiet '/thinwire[rl,train,bench]'")
    .env({"THINWIRE_DATA": "/data"})
)
if os.environ.get("THINWIRE_DATA") and modal.is_local():
    image = image.add_local_dir(Path(os.environ["THINWIRE_DATA"]) / "text", "/data/text")


@app.function(image=image, gpu=f"L4:{GPUS}", timeout=HOURS * 3600)
def train(options: list[str]) -> None:
    """One run under torchrun, a worker a GPU."""
    command = ["torchrun", f"--nproc_per_node={GPUS}", "-m", "thinwire", "train", "lm", *options]
    subprocess.run(command, check=True)


@app.function(image=image, cpu=CORES, timeout=HOURS * 3600)
def run_experiment(options: list[str]) -> tuple[bytes, bytes]:
    """The benchmark, a run a core: small models keep cores busier than GPUs. Returns its rows and its figure."""
    rows, figure = Path("/tmp/signal.jsonl"), Path("/tmp/signal.png")
    command = ["thinwire", "bench", "signal", "--jobs", str(CORES), "--out", str(rows), "--figure", str(figure)]
    subprocess.run([*command, *options], check=True)
    return rows.read_bytes(), figure.read_bytes()


@app.local_entrypoint()
def main(experiment: bool = False, scenarios: str = "", seeds: int = 3, steps: int = 0) -> None:
    """What ``modal run`` calls."""
    if not experiment:
        corrupted = ["--shards", "clean_vs_corrupt", "--corruption", "token_swap", "--corruption-prob", "0.3"]
        train.remote(["--aggregate", "signal", "--signal", "loss_ema", *corrupted])
        return
    options = ["--seeds", str(seeds)]
    options += ["--scenarios", scenarios] if scenarios else []
    options += ["--steps", str(steps)] if steps else []
    rows, figure = run_experiment.remote(options)
    Path("signal.jsonl").write_bytes(rows)
    Path("signal.png").write_bytes(figure)
    print("rows in signal.jsonl, figure in signal.png")

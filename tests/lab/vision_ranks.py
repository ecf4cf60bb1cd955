"""What two ranks do for ``test_vision_ranks.py``: run by torchrun, writes each rank's findings as JSON.

Starting processes costs more than training here, so one start serves many runs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire.errors import MisuseError
from thinwire.lab.trainer.options import COMPRESSORS
from thinwire.lab.vision.config import VisionConfig
from thinwire.lab.vision.recipe import train
from thinwire.lab.vision.summary import Summary

BASE = VisionConfig(epochs=4, width=8, batch_size=16, train_limit=640, test_limit=64, dropout=0.2)
TOPK = replace(BASE, compress="topk", density=0.05, mode="split", density_warmup_steps=8, momentum=0.0,
               feedback_momentum=0.9, lr=0.1)  # fmt: skip


def facts(summary: Summary) -> dict[str, Any]:
    return {
        "digest": summary.digest,
        "accuracy": summary.accuracy,
        "losses": [row.train_loss for row in summary.history],
        "received": summary.bytes_received,
        "dense": summary.bytes_dense,
        "steps": summary.steps,
        "finished": summary.finished,
    }


def run(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"topk": facts(train(TOPK))}
    out = str(folder / "run")
    for stop in (5, 33, None):  # in the warm-up, within the second epoch, to the end
        found[f"topk until {stop}"] = facts(train(replace(TOPK, out=out, resume="auto", stop_after=stop)))
    norms = replace(BASE, model="resnet18", train_limit=96, test_limit=16, epochs=1, batch_size=8)
    found["norms"] = facts(train(norms))
    for stop in (3, None):
        found[f"norms until {stop}"] = facts(train(replace(norms, out=out + "-norms", resume="auto", stop_after=stop)))
    short = replace(BASE, epochs=1, train_limit=128)
    for name in COMPRESSORS:
        found[name + " short"] = facts(train(replace(short, compress=name, density=0.1)))
    found["all sent"] = facts(train(replace(short, compress="topk", density=1.0, mode="gather", clip_norm=0.5)))
    found["dense"] = facts(train(replace(short, clip_norm=0.5)))
    found["scaled"] = facts(train(replace(short, compress="topk", density=0.1, precision="float16")))
    found["whole"] = facts(train(replace(short, dropout=0.0)))
    found["in parts"] = facts(train(replace(short, dropout=0.0, accumulate=4)))
    try:
        train(replace(short, compress="topk", density=0.1 * (1 + dist.get_rank())))
    except MisuseError as error:
        found["unlike"] = str(error)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    findings = run(folder)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(findings))
    dist.destroy_process_group()

"""What two ranks do for ``test_text_ranks.py``: run by torchrun, writes each rank's findings as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire.errors import MisuseError
from thinwire.lab.text.config import LmConfig
from thinwire.lab.text.recipe import train
from thinwire.lab.text.summary import Summary

BASE = LmConfig(
    epochs=2, train_limit=7000, valid_limit=900, context=16, layers=1, width=32, heads=2, dropout=0.1, sample=30,
)  # fmt: skip
SPOILT = replace(BASE, shards="clean_vs_corrupt", epochs=1)
STALE = replace(SPOILT, corruption="stale", corruption_prob=0.7, stale_steps=3, compress="topk", density=0.1,
                mode="split", density_warmup_steps=6, epochs=2)  # fmt: skip


def facts(summary: Summary) -> dict[str, Any]:
    return {
        "digest": summary.digest,
        "sample": summary.sample,
        "losses": [(row.train_loss, row.valid_loss) for row in summary.history],
        "received": summary.bytes_received,
        "dense": summary.bytes_dense,
        "steps": summary.steps,
        "finished": summary.finished,
        "corrupted": summary.corrupted,
    }


def run(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"stale": facts(train(STALE))}
    out = str(folder / "run")
    for stop in (3, 19, None):  # in the warm-up, within an epoch, to the end
        found[f"stale until {stop}"] = facts(train(replace(STALE, out=out, resume="auto", stop_after=stop)))
    for shards in ("iid", "non_iid"):
        found[shards] = facts(train(replace(BASE, epochs=1, shards=shards, live=True, out=str(folder / shards))))
    for kind in ("token_swap", "label_noise", "duplicated_batch", "sign_flip"):
        spoilt = replace(SPOILT, corruption=kind, corruption_prob=1.0, out=str(folder / kind))
        found[kind] = facts(train(spoilt))
    found["bpe"] = facts(train(replace(BASE, tokens="bpe", vocabulary=300, steps=3)))
    found["all sent"] = facts(train(replace(SPOILT, compress="topk", density=1.0, mode="gather")))
    found["dense"] = facts(train(SPOILT))
    path = folder / f"text-{dist.get_rank()}.txt"
    path.write_text(f"this is the text of worker {dist.get_rank()}\n" * 300)
    try:
        train(replace(BASE, data=str(path)))
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

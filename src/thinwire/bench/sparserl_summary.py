"""A run of SparseRL in one line: what tables, figures and the leaderboard are made of, and what is kept of a suite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from thinwire.bench.measure import write_rows
from thinwire.bench.sparserl_results import Result, read_results
from thinwire.errors import MalformedError, MisuseError

__all__ = ["METRICS", "Summary", "read_summaries", "summary_of", "write_summaries"]

Summary = dict[str, Any]
"""The axes ``model``, ``task``, ``method``, ``seed``, ``algorithm``, ``lr``, the ``status`` and the :data:`METRICS`."""

METRICS: dict[str, str] = {
    "score": "sampled reward on held-out problems after the run",
    "gain": "its rise in the run",
    "greedy": "reward of the likeliest answers after the run",
    "area": "mean reward of the batches learnt from",
    "forgetting": "fall of the other tasks' sampled reward, their mean",
    "loss_rise": "rise of the loss of the other tasks' right answers, nats a token",
    "sync_bytes": "bytes of a step's patch, mean",
    "whole_bytes": "bytes of all that is published, once",
    "changed": "share of the model's weights whose bf16 changed in a step, mean",
    "null": "what random gradients would have changed",
    "excess": "changed less null",
    "flops": "floating-point operations of the run",
    "memory": "bytes by which the run raised its process's memory",
    "optimizer_bytes": "bytes of the optimiser's state",
    "trainable": "numbers trained",
    "seconds": "seconds of the run",
}
"""What is told of each run, in words."""

_AXES = ("model", "task", "method", "seed")


def summary_of(result: Result) -> Summary:
    """The line of a result. A run that diverged scores 0 and gained nothing; what it measured until then is kept."""
    run, train = result["run_info"], result["train_info"]
    config, rows, total = run["train_config"], train["metrics"], train["num_total_params"]
    sound = train["status"] == "success"
    before, after = train["scores_before"], train["scores"] if sound else {"sampled": 0.0, "greedy": 0.0}
    pairs = [(was, train["others"][task]) for task, was in train["others_before"].items() if task in train["others"]]

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if row.get(key) is not None]
        return fmean(values) if values else None

    changed, null = mean("changed"), mean("null")
    return {
        "bench": "sparserl", "id": run["id"], "model": config["model_name"], "task": config["task"],
        "method": config["method"], "seed": config["seed"], "algorithm": config["algorithm"], "lr": config["lr"],
        "steps": config["steps"], "status": train["status"], "error": run["error_msg"],
        "score": after["sampled"], "gain": after["sampled"] - before["sampled"], "greedy": after["greedy"],
        "area": mean("reward"),
        "forgetting": fmean(was["sampled"] - now["sampled"] for was, now in pairs) if pairs else None,
        "loss_rise": fmean(now["loss"] - was["loss"] for was, now in pairs) if pairs else None,
        "sync_bytes": mean("sync_bytes"), "whole_bytes": train["file_size"],
        "changed": None if changed is None else changed / total, "null": None if null is None else null / total,
        "excess": None if changed is None or null is None else (changed - null) / total, "flops": train["flops"],
        "memory": train["host_memory_max"], "optimizer_bytes": train["optimizer_state_bytes"],
        "trainable": train["num_trainable_params"], "total": total, "seconds": train["train_time"],
        "machine": result["meta_info"]["system_info"], "versions": result["meta_info"]["package_info"],
    }  # fmt: skip


def write_summaries(path: Path, summaries: Sequence[Summary]) -> None:
    """One line of JSON a run, in the order of their axes."""
    ordered = sorted(summaries, key=lambda s: tuple(s[axis] for axis in _AXES))
    write_rows(path, [{k: round(v, 7) if isinstance(v, float) else v for k, v in s.items()} for s in ordered])


def read_summaries(source: Path) -> list[Summary]:
    """Lines of a suite's folder, or of a file that :func:`write_summaries` wrote.

    Raises:
        MisuseError: there is nothing there.
        MalformedError: a result or a line is damaged.
    """
    if source.is_dir():
        return [summary_of(result) for result in read_results(source)]
    if not source.is_file():
        raise MisuseError(f"there is no folder or file {source} with results")
    found = []
    for number, line in enumerate(source.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            missing = [key for key in (*_AXES, "status", *METRICS) if key not in row]
        except (ValueError, TypeError) as error:
            raise MalformedError(f"{source}, line {number} is damaged: {error}") from error
        if missing:
            raise MalformedError(f"{source}, line {number} has no {missing[0]!r}; it is no line of SparseRL")
        found.append(row)
    if not found:
        raise MisuseError(f"{source} is empty")
    return found

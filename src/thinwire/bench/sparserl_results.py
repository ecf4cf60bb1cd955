"""Result files of SparseRL: near to those of PEFT's method comparison, so that its tools read ours.

``run_info``, ``train_info`` and ``meta_info`` have the keys of ``method_comparison/MetaMathQA/results`` in
huggingface/peft; what reinforcement and publishing add stands beside them. ``docs/sparserl.md`` describes every key.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from thinwire.bench.measure import machine, versions
from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.sparserl.train import Cell

__all__ = ["SCHEMA", "Result", "read_result", "read_results", "result_of"]

SCHEMA = 1
"""Of the files; results of another are not read."""

Result = dict[str, Any]
_BYTES_MAX = 64 << 20
_PACKAGES = ("transformers", "peft", "datasets", "torch", "trl", "reasoning_gym")
_NEEDED: dict[str, tuple[str, ...]] = {
    "run_info": ("experiment_name", "train_config", "created_at", "id", "schema"),
    "train_info": ("status", "metrics", "scores", "scores_before", "num_trainable_params", "num_total_params"),
    "meta_info": ("package_info", "system_info"),
}


def _plain(value: Any) -> Any:
    """Without infinities and NaNs, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        found[f"{package.replace('_', '-')}-version"] = None
        with suppress(metadata.PackageNotFoundError):
            found[f"{package.replace('_', '-')}-version"] = metadata.version(package)
    return found


def result_of(
    cell: Cell, id: str, record: Mapping[str, Any], *, created_at: str, memory: int | None
) -> Result:  # fmt: skip
    """The result of a cell from the record of :func:`thinwire.lab.sparserl.train.train`.

    ``memory``: bytes by which the run raised the process's memory.
    """
    import torch

    scores = record["after"] or {"sampled": None}
    status = {"success": "success", "diverged": "diverged"}[record["status"]]
    found: Result = _plain({
        "run_info": {
            "schema": SCHEMA, "id": id, "created_at": created_at, "total_time": record["seconds"],
            "experiment_name": f"{cell.method}/{cell.model_name}--{cell.task}--seed{cell.seed}",
            "peft_branch": None, "train_config": asdict(cell), "peft_config": record["settings"],
            "error_msg": record["error"],
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None, "accelerator_memory_max": None,
            "accelerator_memory_reserved_99th": None, "host_memory_max": memory, "train_time": record["seconds"],
            "file_size": record["whole_bytes"], "num_trainable_params": record["trainable"],
            "num_total_params": record["total"], "num_published_params": record["published"],
            "optimizer_state_bytes": record["optimiser_bytes"], "flops": record["flops"], "status": status,
            "scores": scores, "scores_before": record["before"], "others": record["others_after"],
            "others_before": record["others_before"], "metrics": record["steps"],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {cell.task: {"sha": None, "created_at": None}},
            "package_info": _packages() | versions(),
            "system_info": {
                "system": platform.system(), "release": platform.release().split("-")[0],
                "machine": platform.machine(), "processor": machine()["cpu"], "accelerator": None, **machine(),
            },
            "pytorch_info": torch.__config__.show().splitlines()[0],
        },
    })  # fmt: skip
    return found


def read_result(path: Path) -> Result:
    """One result file.

    Raises:
        MalformedError: it is cut off, no result, or of another schema; removing it makes the suite run it again.
    """
    again = f"remove {path}, and the suite makes it again"
    if path.stat().st_size > _BYTES_MAX:
        raise MalformedError(f"{path} is larger than {_BYTES_MAX} bytes; that is no result: {again}")
    try:
        found = json.loads(path.read_text())
        for part, keys in _NEEDED.items():
            missing = [key for key in keys if key not in found[part]]
            if missing:
                raise KeyError(f"{part}.{missing[0]}")
        schema = found["run_info"]["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedError(f"{path} is damaged ({type(error).__name__}: {error}): {again}") from error
    if schema != SCHEMA:
        raise MalformedError(f"{path} is of schema {schema!r}, not {SCHEMA}: {again}")
    return dict(found)


def read_results(folder: Path) -> list[Result]:
    """All results in a suite's folder.

    Raises:
        MisuseError: there is none.
        MalformedError: as :func:`read_result`.
    """
    where = folder / "results" if (folder / "results").is_dir() else folder
    found = [read_result(path) for path in sorted(where.glob("*.json"))]
    if not found:
        raise MisuseError(f"there are no results in {where}; run the suite first")
    return found

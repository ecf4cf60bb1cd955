"""Merging fine-tunes in sparse space beside the dense way, on the same files: time, resident memory, bytes stored.

The dense way is mergekit's own code for one tensor (without mergekit: our readable oracle), fed tensor by tensor from
mapped checkpoints; the sparse way is fed from mapped patches, and checks the base's digest within its time. Resident
memory counts mapped pages that were touched, in both. The results are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from thinwire.bench.measure import extra_memory, load, machine, seconds, versions
from thinwire.integrations.merging import merged_deltas, open_readers
from thinwire.merge.delta import TensorDelta
from thinwire.merge.oracle import merge_dense
from thinwire.merge.recipe import Recipe, recipe_of
from thinwire.sync.checkpoint import diff_checkpoints, open_checkpoint, tensors_of
from thinwire.sync.encode import Options
from thinwire.sync.files import map_private
from thinwire.tensors.bits import cells_of
from thinwire.wire.patch import Patch

__all__ = ["MergeOptions", "run_merge"]

Row = dict[str, Any]
Report = Callable[[str], None]

_TENSOR = 1 << 22
_ULP_STEPS = 0.75  # of the changes are one unit in the last place, as after small learning rates


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """``numel`` parameters in bf16, in tensors of 2^22; ``density`` of them changed by each of ``tasks`` fine-tunes."""

    numel: int = 100_000_000
    tasks: int = 8
    density: float = 0.01
    keep: float = 0.005
    methods: tuple[str, ...] = ("task_arithmetic", "ties", "sce", "ram")
    repeats: int = 3
    seed: int = 0


def _write_inputs(folder: Path, options: MergeOptions, report: Report) -> tuple[Path, list[Path], list[Path]]:
    generator = torch.Generator().manual_seed(options.seed)
    base: dict[str, torch.Tensor] = {}
    left = options.numel
    while left > 0:
        rows = max(1, min(left, _TENSOR) // 2048)
        base[f"layers.{len(base)}.weight"] = (torch.randn(rows, 2048, generator=generator) * 0.02).bfloat16()
        left -= rows * 2048
    save_file(base, folder / "base.safetensors")
    checkpoints, patches = [], []
    for task in range(options.tasks):
        report(f"merge: making fine-tune {task + 1} of {options.tasks}")
        tuned = {name: _tuned(tensor, options.density, generator) for name, tensor in base.items()}
        checkpoints.append(folder / f"{task}.safetensors")
        save_file(tuned, checkpoints[-1])
        patch = diff_checkpoints(open_checkpoint(folder / "base.safetensors"), open_checkpoint(checkpoints[-1]))
        patches.append(folder / f"{task}.patch")
        patches[-1].write_bytes(b"".join(patch.encode()))
    return folder / "base.safetensors", checkpoints, patches


def _tuned(base: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """A bf16 tensor with steps of one unit in the last place, and some larger ones, at random places."""
    cells = base.clone().view(torch.int16).view(-1)
    drawn = torch.randint(0, cells.numel(), (int(cells.numel() * density),), generator=generator)
    places = torch.from_numpy(np.unique(drawn.numpy()))
    steps = torch.ones(places.numel(), dtype=torch.int16)
    larger = torch.rand(places.numel(), generator=generator) >= _ULP_STEPS
    steps[larger] = torch.randint(2, 4, (int(larger.sum()),), generator=generator, dtype=torch.int16)
    steps[torch.rand(places.numel(), generator=generator) < 0.5] *= -1
    cells[places] += steps
    return cells.view(base.shape).view(torch.bfloat16)


def _dense(base: Path, checkpoints: list[Path], recipe: Recipe) -> Iterator[tuple[str, torch.Tensor]]:
    """The merged tensors by the dense way, one after another."""
    source = tensors_of(open_checkpoint(base).map())
    tuned = [tensors_of(open_checkpoint(path).map()) for path in checkpoints]
    name = recipe.method.name
    if find_spec("mergekit") is not None:
        from mergekit.merge_methods.api import merge_tensors

        for tensor in source:
            found = recipe.at(tensor)
            parameters = {k: v for k, v in found.shared.items() if k in recipe.method.parameters}
            parameters.pop("lambda", None) if name in ("sce", "ram") else None
            for key in found.tasks[0] if found.tasks else ():
                parameters[key] = [task[key] for task in found.tasks]
            yield tensor, merge_tensors(
                [source[tensor], *(state[tensor] for state in tuned)], name, parameters=parameters, base_index=0,
                dtype=torch.float32, out_dtype=torch.bfloat16,
            )  # fmt: skip
        return
    for tensor, old in source.items():
        vectors = torch.stack([(state[tensor].float() - old.float()).view(-1) for state in tuned])
        merged = merge_dense(name, vectors, recipe.at(tensor), torch.ones_like(vectors))
        yield tensor, (old.float() + merged.view(old.shape)).bfloat16()


def _sparse(base: Path, patches: list[Path], recipe: Recipe) -> Iterator[tuple[str, TensorDelta]]:
    """The merged deltas, one after another."""
    parsed = [Patch.parse(map_private(path)) for path in patches]  # type: ignore[arg-type]
    return merged_deltas(open_readers(open_checkpoint(base), parsed), recipe)


def _exhaust(items: Iterator[object]) -> None:
    for _ in items:
        pass


def _agree(base: Path, dense: Iterator[tuple[str, torch.Tensor]], sparse: dict[str, TensorDelta]) -> float:
    """The share of merged cells in which both ways give the same bits (equal magnitudes at a cut may differ)."""
    source = open_checkpoint(base).map()
    same = total = 0
    for name, tensor in dense:
        cells = source.cells[name].copy()
        if name in sparse:
            cells[sparse[name].positions] = sparse[name].new
        changed = (cells != source.cells[name]) | (cells_of(tensor) != source.cells[name])
        total += int(changed.sum())
        same += int((cells[changed] == cells_of(tensor)[changed]).sum())
    return same / max(total, 1)


def _storage(base: Path, checkpoint: Path) -> Row:
    """Bytes a changed weight, as steps from the base and as values of their own."""
    found: Row = {}
    for values in ("ulp", "absolute"):
        patch = diff_checkpoints(open_checkpoint(base), open_checkpoint(checkpoint), Options("smallest", values))
        found[values] = sum(len(b) for b in patch.encode()) / max(patch.changed, 1)
    return found


def run_merge(options: MergeOptions, *, report: Report = print, folder: Path | None = None) -> list[Row]:
    """One row a method: seconds (best of the repeats) and extra resident bytes of both ways, and their ratios."""
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as where:
        base, checkpoints, patches = _write_inputs(Path(where), options, report)
        stored = _storage(base, checkpoints[0])
        for name in options.methods:
            settings: Row = {"density": options.keep} if name in ("ties", "breadcrumbs") else {}
            recipe = recipe_of(name, options.tasks, **settings)
            report(f"merge: {name}, comparing")
            agree = _agree(base, _dense(base, checkpoints, recipe), dict(_sparse(base, patches, recipe)))
            assert agree > 0.95, f"{name}: only {agree:.2%} of the merged weights are those of the dense way"
            report(f"merge: {name}, timing")
            times: dict[str, list[float]] = {"dense": [], "sparse": []}
            for _ in range(options.repeats):
                times["sparse"].append(seconds(lambda recipe=recipe: _exhaust(_sparse(base, patches, recipe))))  # type: ignore[misc]
                times["dense"].append(seconds(lambda recipe=recipe: _exhaust(_dense(base, checkpoints, recipe))))  # type: ignore[misc]
            memory = {
                "sparse": extra_memory(lambda recipe=recipe: _exhaust(_sparse(base, patches, recipe))),  # type: ignore[misc]
                "dense": extra_memory(lambda recipe=recipe: _exhaust(_dense(base, checkpoints, recipe))),  # type: ignore[misc]
            }
            best = {key: min(found) for key, found in times.items()}
            ratio = memory["dense"] / memory["sparse"] if memory["dense"] and memory["sparse"] else None
            rows.append(
                {
                    "bench": "merge",
                    "method": name,
                    "numel": options.numel,
                    "tasks": options.tasks,
                    "density": options.density,
                    "keep": settings.get("density"),
                    "best_s": best,
                    "median_s": {key: float(np.median(found)) for key, found in times.items()},
                    "times_faster": best["dense"] / best["sparse"],
                    "extra_bytes": memory,
                    "times_less": ratio,
                    "same_bits": agree,
                    "bytes_per_changed": stored,
                    "dense": "mergekit" if find_spec("mergekit") else "oracle",
                    "load": load(),
                    "machine": machine(),
                    "versions": versions(),
                }
            )
    return rows

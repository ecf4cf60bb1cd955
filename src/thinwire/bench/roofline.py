"""What a sparse step could cost at best: bytes and operations counted, bandwidths measured, and the step beside them.

A cell that is stepped moves a whole cache line of the gradient and of the weights. Lines in a row come at the
``stream`` bandwidth, lines far apart at that of ``lines``: a core waits for few misses at a time, and looks up pages.
Both are measured here, on the same machine and in the same minute as the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from thinwire.bench.measure import load, machine, seconds, versions
from thinwire.errors import MisuseError
from thinwire.optim import ASPG, kernels

__all__ = ["RooflineOptions", "cost", "roofline_table", "run_roofline"]

Row = dict[str, Any]
OPERATIONS = 15  # of AdamW, a cell: square roots and divisions count as one
DENSE_BYTES = 28  # a cell: gradient, weight and two moments are read, all but the gradient written
_STATE_BYTES = (
    40  # an active cell: position (twice), entry, gathered value (both ways), two moments (both ways), 4 spare
)
_LINE, _CELLS = 64, 16


@dataclass(frozen=True, slots=True)
class RooflineOptions:
    """fp32 elements, densities, threads, rounds."""

    numel: int = 100_000_000
    densities: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    threads: int = 1
    repeats: int = 7

    def __post_init__(self) -> None:
        if self.numel < 1000 or self.threads < 1 or self.repeats < 1:
            raise MisuseError("numel must be at least 1000; threads and repeats at least 1")
        if not self.densities or not all(0 < d < 1 for d in self.densities):
            raise MisuseError(f"densities must lie between 0 and 1, not {self.densities}")


def cost(numel: int, density: float) -> dict[str, float]:
    """Of a step at random positions: cells, cache lines of one tensor, bytes by lines and by streams, operations.

    >>> found = cost(1600, 0.01)
    >>> round(found["cells"]), round(found["lines"], 2), found["line_bytes"] == 3 * 64 * found["lines"]
    (16, 14.85, True)
    """
    cells = numel * density
    lines = numel / _CELLS * (1 - (1 - density) ** _CELLS)
    return {
        "cells": cells, "lines": lines, "line_bytes": 3 * _LINE * lines, "stream_bytes": _STATE_BYTES * cells,
        "operations": OPERATIONS * cells,
    }  # fmt: skip


class _Stream:
    """Three tensors that pass by: their bandwidth, and caches that hold nothing else afterwards."""

    def __init__(self, n: int) -> None:
        self._tensors = [torch.ones(n) for _ in range(3)]
        self.bytes = 16 * n  # what is written is read first
        self.best_s = float("inf")

    def __call__(self) -> None:
        first, second, third = self._tensors
        self.best_s = min(self.best_s, seconds(lambda: torch.add(first, second, out=third)))

    def before(self, work: Callable[[], object]) -> float:
        """Seconds of ``work`` that finds nothing in the caches."""
        self()
        return seconds(work)


def run_roofline(options: RooflineOptions, report: Callable[[str], None] = lambda _: None) -> list[Row]:
    """A row for the dense step and one a density."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _rows(options, report)
    finally:
        torch.set_num_threads(before)


def _rows(options: RooflineOptions, report: Callable[[str], None]) -> list[Row]:
    random, n = torch.Generator().manual_seed(0), options.numel
    p = torch.nn.Parameter(torch.randn(n, generator=random))
    p.grad = torch.randn(n, generator=random)
    report("streams, and the dense step")
    dense = torch.optim.AdamW([p], lr=1e-5, fused=True)
    dense.step()
    stream = _Stream(n)
    dense_s = min(stream.before(dense.step) for _ in range(options.repeats))
    del dense
    measured = []
    for density in options.densities:
        report(f"density {density:g}")
        measured.append(_sparse(p, density, stream, options.repeats))
    best = max(stream.bytes / stream.best_s, DENSE_BYTES * n / dense_s)
    common = {
        "numel": n, "threads": options.threads, "stream_gbps": round(best / 1e9, 2), "load": load(),
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    rows: list[Row] = [
        {
            "kind": "dense", "density": 1.0, "step_s": dense_s, "bound_s": DENSE_BYTES * n / best,
            "bytes": DENSE_BYTES * n, "operations": OPERATIONS * n, **common,
        }
    ]  # fmt: skip
    return rows + [_bounded(n, *found, best) | common for found in measured]


def _sparse(p: torch.nn.Parameter, density: float, stream: _Stream, repeats: int) -> tuple[float, float, float]:
    """The density, and seconds of fetching its lines and of a step, in turn."""
    optimizer = ASPG([p], lr=1e-5, density=density, refresh_every=1 << 40)
    optimizer.step()
    positions, gradient = optimizer.state[p]["positions"], p.grad
    assert gradient is not None
    found = [
        (stream.before(lambda: kernels.gather(gradient, positions)), stream.before(optimizer.step))
        for _ in range(repeats)
    ]
    return density, min(lines for lines, _ in found), min(step for _, step in found)


def _bounded(n: int, density: float, lines_s: float, step_s: float, stream: float) -> Row:
    counted = cost(n, density)
    lines_bytes = _LINE * counted["lines"]
    # A line that is written comes and goes: the way back is a stream's at best.
    bound = 2 * lines_s + (lines_bytes + counted["stream_bytes"]) / stream
    return {
        "kind": "sparse", "density": density, "step_s": step_s, "bound_s": bound,
        "lines_gbps": round(lines_bytes / lines_s / 1e9, 2),
        "ideal_s": (counted["line_bytes"] + counted["stream_bytes"]) / stream,
        "bytes": counted["line_bytes"] + counted["stream_bytes"], "operations": counted["operations"],
    }  # fmt: skip


def roofline_table(rows: Sequence[Row]) -> Table:
    """One line a row: what was measured, the bound for this machine's lines, and that for lines at stream speed."""
    table = Table(title="A step, ms", title_justify="left")
    for heading in ("density", "GB", "op/byte", "lines GB/s", "measured", "bound", "share", "at stream speed"):
        table.add_column(heading, justify="right")
    for row in rows:
        ideal_s = row["ideal_s"] if row["kind"] == "sparse" else row["bound_s"]
        table.add_row(
            f"{row['density']:.1%}", f"{row['bytes'] / 1e9:.3g}", f"{row['operations'] / row['bytes']:.2f}",
            f"{row.get('lines_gbps', row['stream_gbps']):.1f}", f"{1000 * row['step_s']:.2f}",
            f"{1000 * row['bound_s']:.2f}", f"{row['bound_s'] / row['step_s']:.0%}",
            f"{1000 * ideal_s:.2f}",
        )  # fmt: skip
    return table

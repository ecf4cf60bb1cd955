"""A backward pass that computes a tenth of the weight gradients beside the dense one: operations, seconds, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from thinwire.bench.measure import load, machine, seconds, versions
from thinwire.errors import MisuseError
from thinwire.optim import PredictiveBackward

__all__ = ["PredictiveOptions", "predictive_table", "run_predictive"]

Row = dict[str, Any]
METHODS = ("dense", "row", "module")


@dataclass(frozen=True, slots=True)
class PredictiveOptions:
    """Layers of ``width`` by ``width``, rows of the batch, share of rows that are active, rounds."""

    layers: int = 8
    width: int = 1024
    batch: int = 256
    rows: float = 0.125
    repeats: int = 7

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.batch, self.repeats) < 1 or not 0 < self.rows <= 1:
            raise MisuseError("sizes must be at least 1, rows above 0 and at most 1")


def _network(options: PredictiveOptions) -> torch.nn.Sequential:
    torch.manual_seed(0)
    width = options.width
    return torch.nn.Sequential(
        *(layer for _ in range(options.layers) for layer in (torch.nn.Linear(width, width), torch.nn.GELU()))
    )


def _kept_bytes(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Of what forward keeps for backward, without weights; and of the gradients."""
    weights, kept = {p.data_ptr() for p in model.parameters()}, dict[int, int]()

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in weights:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(x).square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(kept.values()) + sum((g._values() if g.is_sparse else g).numel() * g.element_size() for g in grads)


def run_predictive(options: PredictiveOptions, report: Callable[[str], None] = lambda _: None) -> list[Row]:
    """A row a method: floating-point operations of backward, best and median seconds, bytes kept and of gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = {name: _network(options) for name in METHODS}
        x = torch.randn(options.batch, options.width)
        with torch.no_grad():
            out = models["dense"](x)
        for name in METHODS[1:]:
            predictive = PredictiveBackward(models[name], rows=options.rows, every=1 << 40, unit=name)
            found = models[name](x)
            if not torch.equal(found.detach(), out):
                raise AssertionError("the forward pass differs; nothing was timed")
            found.square().mean().backward()
            predictive.update()
        report("timing")
        times: dict[str, list[float]] = {name: [] for name in METHODS}
        for _ in range(options.repeats):
            for name, model in models.items():
                model.zero_grad()
                loss = model(x).square().mean()
                times[name].append(seconds(loss.backward))
        return [_row(options, name, models[name], x, sorted(times[name])) for name in METHODS]
    finally:
        torch.set_num_threads(before)


def _row(options: PredictiveOptions, name: str, model: torch.nn.Module, x: torch.Tensor, times: list[float]) -> Row:
    model.zero_grad()
    loss = model(x).square().mean()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    model.zero_grad()
    return {
        "method": name, "layers": options.layers, "width": options.width, "batch": options.batch,
        "rows": 1.0 if name == "dense" else options.rows, "flops": counter.get_total_flops(),
        "best_s": round(times[0], 6), "median_s": round(times[len(times) // 2], 6), "runs": options.repeats,
        "threads": 1, "kept_bytes": _kept_bytes(model, x), "load": load(), "machine": machine(), "versions": versions(),
    }  # fmt: skip


def predictive_table(rows: Sequence[Row]) -> Table:
    """One line a method."""
    table = Table(title="Backward", title_justify="left")
    for heading in ("active", "GFLOP", "best (median) ms", "kept and gradients, MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = f"{1000 * row['best_s']:.0f} ({1000 * row['median_s']:.0f})"
        table.add_row(row["method"], f"{row['flops'] / 1e9:.2f}", times, f"{row['kept_bytes'] / 1e6:.1f}")
    return table

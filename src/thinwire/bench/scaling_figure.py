"""The scaling rows as a picture: what was measured as markers, what was simulated as dashed lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinwire.bench.gradients_methods import METHODS
from thinwire.bench.scaling_model import SIMULATED

__all__ = ["scaling_figure"]

Row = dict[str, Any]
_COLORS = {"fp32": "#374151", "fp16": "#9ca3af", "allgather": "#c0392b", "split": "#0b6e4f", "shared": "#2f9ed8"}
_MARKERS = {"fp32": "s", "fp16": "D", "allgather": "^", "split": "o", "shared": "v"}


def _of(rows: Sequence[Row], kind: str, method: str, key: str) -> tuple[list[int], list[float]]:
    """Numbers of workers and values; a single worker exchanges nothing, which a logarithm cannot show."""
    found = [
        (row["workers"], row[key])
        for row in rows
        if row["kind"] == kind and row["method"] == method and row["workers"] > 1 and row[key]
    ]
    return [workers for workers, _ in found], [value for _, value in found]


def _ends(axis: Any, ends: Sequence[tuple[float, str, str]], at: float) -> None:
    """Names at the ends of the lines, a line of text apart."""
    least = 0.0
    for value, text, color in sorted(ends):
        value = max(value, 1.22 * least)
        axis.text(at * 1.08, value, text, fontsize=8.5, color=color, va="center")
        least = value


def scaling_figure(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds and bytes an exchange against the number of workers, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    first = rows[0]
    full_mb = 4e-6 * first["numel"]
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    time_axis, bytes_axis = figure.subplots(1, 2)
    last = max(row["workers"] for row in rows if row["kind"] == "simulated")
    time_ends, bytes_ends = [], []
    for method in SIMULATED:
        color, marker = _COLORS[method], _MARKERS[method]
        points = {"color": color, "marker": marker, "linestyle": "none", "markersize": 7, "zorder": 3}
        workers, own = _of(rows, "simulated", method, "own_cores_s")
        time_axis.plot(workers, [1e3 * s for s in own], "--", color=color, linewidth=1.8)
        time_ends.append((1e3 * own[-1], METHODS[method].title, color))
        limit = max(_of(rows, "measured", method, "best_s")[0])
        workers, shared = _of(rows, "simulated", method, "shared_cores_s")
        near = [(w, 1e3 * s) for w, s in zip(workers, shared, strict=True) if w <= limit]
        time_axis.plot(*zip(*near, strict=True), ":", color=color, linewidth=1.4)
        workers, best = _of(rows, "measured", method, "best_s")
        time_axis.plot(workers, [1e3 * s for s in best], **points)
        workers, share = _of(rows, "simulated", method, "share_received")
        bytes_axis.plot(workers, [full_mb * s for s in share], "--", color=color, linewidth=1.8)
        bytes_ends.append((full_mb * share[-1], METHODS[method].title, color))
        workers, share = _of(rows, "measured", method, "share_received")
        bytes_axis.plot(workers, [full_mb * s for s in share], **points)
    _ends(time_axis, time_ends, last)
    _ends(bytes_axis, bytes_ends, last)
    time_axis.set(ylabel="time of an exchange (ms)", title="time")
    bytes_axis.set(ylabel="received by a worker in an exchange (MB)", title="bytes")
    numbers = sorted({row["workers"] for row in rows if row["kind"] != "model" and row["workers"] > 1})
    for axis in (time_axis, bytes_axis):
        axis.set(xlabel="workers", xscale="log", yscale="log", xlim=(1.8, last * 2.6))
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.minorticks_off()
        axis.grid(True, alpha=0.2)
    cores = first["machine"]["cores"]
    styles = [
        Line2D([], [], color="black", marker="o", linestyle="none", label=f"measured (all workers on {cores} cores)"),
        Line2D([], [], color="black", linestyle=":", label=f"simulated, {cores} cores shared as measured"),
        Line2D([], [], color="black", linestyle="--", label="simulated, cores of its own for each worker"),
    ]
    time_axis.legend(handles=styles, fontsize=8.5, loc="upper left")
    narrower = {row["measured_numel"] for row in rows if row["kind"] == "measured"} - {first["numel"]}
    where = "measured at the network interface"
    if narrower:
        least = min(row["workers"] for row in rows if row.get("measured_numel") in narrower)
        where += f" (from {least} workers on: of {min(narrower) / 1e6:.1f} M gradients, scaled)"
    bytes_axis.legend(
        handles=[
            Line2D([], [], color="black", marker="o", linestyle="none", label=where),
            Line2D([], [], color="black", linestyle="--", label="simulated, payload alone (split, shared: real code)"),
        ],
        fontsize=8.5,
        loc="upper left",
    )
    time_axis.set_ylim(top=6 * max(value for value, _, _ in time_ends))
    bytes_axis.set_ylim(top=8 * max(value for value, _, _ in bytes_ends))
    model = next(row for row in rows if row["kind"] == "model")
    worst = 100 * max(map(abs, model["errors"]["held_out"].values()))
    network = "ResNet-50" if first["width"] == 64 else f"ResNet-50 of width {first['width']}"
    figure.suptitle(
        f"{network}'s {first['numel'] / 1e6:.1f} M gradients, {first['rate']} a worker, density "
        f"{100 * first['density']:g} %. The model is fitted to fewer than {model['held_out_workers']} workers; "
        f"at the held-out {model['held_out_workers']} it is off by {worst:.0f} % at most.",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

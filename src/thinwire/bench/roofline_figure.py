"""The roofline as a picture: measured bandwidths as roofs, steps as points under them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["roofline_figure"]

Row = dict[str, Any]
_GREY, _GREEN, _BLUE = "#374151", "#0b6e4f", "#2f9ed8"


def roofline_figure(rows: Sequence[Row], path: Path) -> None:
    """Cells a second against bytes a cell, as a PNG: a bandwidth is a falling line.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axis = figure.subplots()
    sparse = [row for row in rows if row["kind"] == "sparse"]
    dense = next(row for row in rows if row["kind"] == "dense")
    slowest = min(row["lines_gbps"] for row in sparse)
    for name, gbps, style in (
        (f"streams, {dense['stream_gbps']:.1f} GB/s", dense["stream_gbps"], "-"),
        (f"lines far apart (slowest), {slowest:.1f} GB/s", slowest, "--"),
    ):
        axis.plot([20, 480], [1e3 * gbps / x for x in (20, 480)], style, color=_GREY, lw=1.2)
        axis.text(30, 1.25e3 * gbps / 30, name, fontsize=9, color=_GREY, va="bottom")
    for row, color, marker in [(dense, _BLUE, "s"), *((row, _GREEN, "o") for row in sparse)]:
        cells = row["numel"] * row["density"]
        axis.plot(row["bytes"] / cells, cells / row["step_s"] / 1e6, marker, color=color, ms=8)
        name = "AdamW, fused" if row is dense else f"ASPG, {row['density']:.1%}"
        axis.annotate(
            name, (row["bytes"] / cells, cells / row["step_s"] / 1e6), (9, -3), textcoords="offset points",
            ha="left", fontsize=9, color=color,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(20, 480)
    axis.set_xticks([28, 50, 100, 200], ["28", "50", "100", "200"])
    axis.minorticks_off()
    axis.set_xlabel("bytes moved a stepped cell, whole cache lines")
    axis.set_ylabel("million cells a second")
    axis.set_title(f"{dense['numel'] / 1e6:g} M fp32 cells, {dense['threads']} thread", loc="left", fontsize=11)
    axis.grid(alpha=0.2)
    figure.savefig(path, dpi=150)

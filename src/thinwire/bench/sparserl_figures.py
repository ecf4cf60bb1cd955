"""Pareto plots: what a method scores against what it costs to send, to hold and to compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinwire.errors import MisuseError

__all__ = ["COSTS", "front", "pareto_figures"]

COSTS: dict[str, str] = {
    "sync_bytes": "sent a step, KiB", "optimizer_bytes": "optimiser's state, KiB", "forgetting": "forgotten, points",
}  # fmt: skip
"""Costs that are drawn, and their axes' labels."""

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#ff7f0e",
           "#000000", "#1b9e77")  # fmt: skip
_MARKS = "osD^vP*X<>ph"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points (cost, score) than which no other is both cheaper and better, by rising cost.

    >>> front([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)])
    [0, 2]
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    found: list[int] = []
    for i in order:
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found


def pareto_figures(board: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG a model: score against each cost, the methods that none beats in both joined by a line.

    Raises:
        MisuseError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MisuseError("figures need Matplotlib: pip install 'thinwire[bench]'") from error
    names = sorted({entry["method"] for entry in board["entries"]})
    drawn = []
    for model in dict.fromkeys(entry["model"] for entry in board["entries"]):
        entries = [entry for entry in board["entries"] if entry["model"] == model]
        figure = Figure(figsize=(11.5, 4.2), layout="constrained")
        panels = figure.subplots(1, len(COSTS), sharey=True)
        for axes, (cost, label) in zip(panels, COSTS.items(), strict=True):
            _panel(axes, entries, cost, names)
            axes.set_xlabel(label)
        panels[0].set_ylabel("score on held-out problems, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
        figure.suptitle(f"{model}: means over tasks and seeds, 95 % intervals; lines join what none beats in both",
                        fontsize=10)  # fmt: skip
        path = folder / f"pareto-{model}.png"
        figure.savefig(path, dpi=150)
        drawn.append(path)
    return drawn


def _panel(axes: Any, entries: Sequence[dict[str, Any]], cost: str, names: Sequence[str]) -> None:
    points = []
    for entry in entries:
        value = entry[cost]
        if value is None:
            continue
        x = 100 * value if cost == "forgetting" else max(value, 1) / 1024
        interval = entry["score_interval"]
        y, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
        place = names.index(entry["method"])
        axes.errorbar(
            [x], [y], yerr=[[max(y - low, 0)], [max(high - y, 0)]], fmt=_MARKS[place % len(_MARKS)], ms=6, capsize=2,
            lw=1, color=_COLORS[place % len(_COLORS)], label=entry["method"], zorder=3,
        )  # fmt: skip
        points.append((x, y))
    best = [points[i] for i in front(points)]
    axes.plot([x for x, _ in best], [y for _, y in best], color="0.6", lw=1, ls="--", zorder=1)
    if cost != "forgetting":
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)

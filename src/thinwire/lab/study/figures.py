"""The study's figures: Matplotlib for papers, Plotly for the page. Intervals are 95 % over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire.errors import MisuseError
from thinwire.lab.study.findings import select
from thinwire.lab.study.matrix import LEVELS
from thinwire.lab.study.statistics import Estimate, mean_of
from thinwire.lab.study.summary import QUARTERS, Summary

__all__ = ["FIGURES", "draw_all"]

Axes = Any
Draw = Callable[[Any, Sequence[Summary], Mapping[str, Any]], None]

_COLORS = {"rl": "#0072b2", "sft": "#d55e00", "pretrain": "#009e73"}
_NAMES = {"rl": "RL (GRPO)", "sft": "supervised", "pretrain": "pre-training"}
_OPTIMISERS = ("adam", "adamw", "sgd", "adafactor")


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    estimate = mean_of([100 * value for value in values])
    return estimate.value, max(estimate.low, 0.0), estimate.high


def _bars(axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], **style: Any) -> None:
    points = [_interval(v) for v in values]
    middle = [point[0] for point in points]
    errors = [[point[0] - point[1] for point in points], [point[2] - point[0] for point in points]]
    axes.errorbar(x, middle, yerr=errors if all(len(v) > 1 for v in values) else None, capsize=2, lw=1.4, **style)


def _tidy(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _over_lr(figure: Any, summaries: Sequence[Summary], centre: Mapping[str, Any]) -> None:
    """Density against the learning rate, by optimiser and objective."""
    drawn = [name for name in _OPTIMISERS if any(s["optimiser"] == name for s in summaries)]
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, optimiser in zip(panels, drawn, strict=True):
        for objective, color in _COLORS.items():
            levels = [select(summaries, centre, objective=objective, optimiser=optimiser, lr=lr) for lr in LEVELS]
            levels = [runs for runs in levels if runs]
            if not levels:
                continue
            x = [next(iter(runs.values()))["lr_value"] for runs in levels]
            seen, null = ([[r["shares"]["1"][side] for r in runs.values()] for runs in levels] for side in (0, 1))
            _bars(axes, x, seen, color=color, marker="o", ms=4, label=_NAMES[objective])
            axes.plot(x, [100 * sum(n) / len(n) for n in null], color=color, ls=":", lw=1.4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(optimiser, fontsize=10)
        _tidy(axes, "learning rate", "")
        axes.grid(alpha=0.25, which="major")
    panels[0].set_ylabel("weights changed in a step, %", fontsize=9)
    panels[0].plot([], [], color="0.3", ls=":", label="null (random gradients)")
    panels[0].legend(fontsize=7, frameon=False)


def _over_time(figure: Any, summaries: Sequence[Summary], centre: Mapping[str, Any]) -> None:
    """Density by quarter of the run."""
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (objective, color) in zip(panels, _COLORS.items(), strict=True):
        runs = list(select(summaries, centre, objective=objective).values())
        if runs:
            x = list(range(1, QUARTERS + 1))
            for side, style in ((0, {"marker": "o", "label": "observed"}), (1, {"ls": ":", "label": "null"})):
                values = [[run["quarters"][q][side] for run in runs] for q in range(QUARTERS)]
                _bars(axes, x, values, color=color, **style)
            axes.set_xticks(x)
            axes.legend(fontsize=8, frameon=False)
        axes.set_title(_NAMES[objective], fontsize=10)
        _tidy(axes, "quarter of the run", "weights changed in a step, %" if objective == "rl" else "")
    panels[0].set_ylim(bottom=0)  # after all panels are drawn: it ends the search for the top


def _by_kind(figure: Any, summaries: Sequence[Summary], centre: Mapping[str, Any]) -> None:
    """Density by kind of tensor, observed beside the null."""
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (objective, color) in zip(panels, _COLORS.items(), strict=True):
        runs = list(select(summaries, centre, objective=objective).values())
        kinds = [k for k in ("embedding", "attention", "mlp", "norm") if runs and k in runs[0]["kinds"]]
        for side, shift, alpha, label in ((0, -0.2, 1.0, "observed"), (1, 0.2, 0.4, "null")):
            points = [_interval([run["kinds"][kind][side] for run in runs]) for kind in kinds]
            errors = [[p[0] - p[1] for p in points], [p[2] - p[0] for p in points]]
            axes.bar([i + shift for i in range(len(kinds))], [p[0] for p in points], 0.38, color=color, alpha=alpha,
                     yerr=errors if len(runs) > 1 else None, capsize=2, label=label)  # fmt: skip
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_title(_NAMES[objective], fontsize=10)
        _tidy(axes, "", "weights changed in a step, %" if objective == "rl" else "")
        if kinds:
            axes.legend(fontsize=8, frameon=False)


def _gain(figure: Any, summaries: Sequence[Summary], _: Mapping[str, Any]) -> None:
    """Gain of reward against density: every RL run."""
    axes = figure.subplots()
    marks = {"none": ("o", "dense"), "random": ("^", "random weights only"), "gradient": ("s", "large gradients only")}
    for enforce, (marker, label) in marks.items():
        runs = [s for s in summaries if s["objective"] == "rl" and s["enforce"] == enforce and s["control"] == "none"]
        runs = [s for s in runs if s["weights"] != "fp32" and s["shares"]["1"][0] > 0]
        if runs:
            axes.scatter([100 * s["shares"]["1"][0] for s in runs], [s["gain"] for s in runs], s=16, marker=marker,
                         alpha=0.7, label=label, linewidths=0)  # fmt: skip
    controls = [s for s in summaries if s["objective"] == "rl" and s["control"] != "none"]
    if controls:
        axes.scatter([100 * s["shares"]["1"][0] for s in controls], [s["gain"] for s in controls], s=16, marker="x",
                     color="0.4", label="controls (random, shuffled)")  # fmt: skip
    axes.axhline(0, color="0.7", lw=0.8)
    axes.set_xscale("log")
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes, "weights changed in a step, %", "gain of the exact reward on held-out problems")


FIGURES: dict[str, tuple[Draw, tuple[float, float], str]] = {
    "learning-rate": (
        _over_lr, (10.5, 3.2),
        "Weights that change in a step against the learning rate. Dotted: the null, what random gradients change.",
    ),
    "time": (_over_time, (9.0, 3.0), "Weights that change in a step, over a run; the null beside it."),
    "kinds": (_by_kind, (9.5, 3.0), "Weights that change in a step, by kind of tensor."),
    "gain": (_gain, (6.0, 4.0), "What RL runs gained against how many weights they changed; each point is a run."),
}  # fmt: skip
"""Figures by name: what draws one, its size in inches, its caption."""


def draw_all(summaries: Sequence[Summary], centre: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every figure as PNG and PDF into ``folder``; returns the PNGs.

    Raises:
        MisuseError: Matplotlib is not installed, or there is no run.
    """
    if not summaries:
        raise MisuseError("there is no run to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MisuseError("figures need Matplotlib: pip install 'thinwire[study]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (draw, size, _) in FIGURES.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, summaries, centre)
        for ending in ("pdf", "png"):
            figure.savefig(folder / f"{name}.{ending}", dpi=150)
        drawn.append(folder / f"{name}.png")
    return drawn


def estimate_text(estimate: Estimate, unit: str) -> str:
    """An estimate with its interval, in per cent where ``unit`` says so.

    >>> estimate_text(Estimate(0.5, 0.25, 0.75, 5), "%"), estimate_text(Estimate(1.5, 1.25, 1.75, 5), "")
    ('50 % (25 to 75)', '1.5 (1.25 to 1.75)')
    """
    scale, sign = (100, " %") if unit == "%" else (1, "")
    value, low, high = (f"{scale * x:.3g}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value}{sign} ({low} to {high})"

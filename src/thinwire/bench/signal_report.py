"""Rows of the signal benchmark as tables and as a figure, and its command."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from thinwire.errors import MisuseError

__all__ = ["signal", "signal_figure", "signal_markdown", "signal_table", "summarise"]

Row = dict[str, Any]
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Two-sided 95 % points of Student's t for 1 to 9 degrees of freedom."""


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean; None of a single value.

    >>> round(interval([1.0, 2.0, 3.0]), 2)
    2.48
    """
    if len(values) < 2:
        return None
    student = _STUDENT[len(values) - 2] if len(values) - 2 < len(_STUDENT) else 1.96
    return student * stdev(values) / sqrt(len(values))


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One line for each scenario and method. Losses are compared seed by seed, which takes out what a seed does to all
    methods alike; ``closed`` is the share of the gap between uniform and oracle, None where that gap is within noise.
    """
    lines = []
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        here = [row for row in rows if row["scenario"] == scenario]
        by_method = {
            method: {row["seed"]: row for row in here if row["method"] == method}
            for method in dict.fromkeys(row["method"] for row in here)
        }
        uniform, oracle = by_method.get("uniform", {}), by_method.get("oracle", {})
        gap, gap_error = _difference(uniform, oracle)
        real = gap is not None and gap_error is not None and gap > gap_error
        for method, found in by_method.items():
            losses = [row["loss"] for row in found.values()]
            gained, error = _difference(uniform, found)
            closed = gained / gap if real and gap is not None and gained is not None else None
            weighted = [row for row in found.values() if row["weighted"]]
            lines.append(
                {
                    "scenario": scenario,
                    "method": method,
                    "seeds": len(found),
                    "loss": mean(losses),
                    "error": interval(losses),
                    "gained": gained,
                    "gained_error": error,
                    "closed": None if method == "uniform" else closed,
                    "gap": gap if real else None,
                    "effective_workers": mean(row["effective_workers"] for row in weighted) if weighted else None,
                    "lowest_good": min((row["lowest_good"] for row in weighted), default=None),
                    "highest_bad": max((row["highest_bad"] for row in weighted), default=None),
                    "bad": here[0]["bad"],
                }
            )
    return lines


def _difference(first: dict[int, Row], second: dict[int, Row]) -> tuple[float | None, float | None]:
    """Mean of the paired differences of loss, and half their confidence interval."""
    pairs = [first[seed]["loss"] - second[seed]["loss"] for seed in first if seed in second]
    return (mean(pairs), interval(pairs)) if pairs else (None, None)


_HEADING = (
    "scenario",
    "method",
    "seeds",
    "loss",
    "below uniform",
    "gap closed",
    "effective",
    "lowest good",
    "highest bad",
)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    def number(value: float | None, error: float | None = None, digits: int = 3) -> str:
        if value is None:
            return "–"
        return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")

    cells = []
    for line in summarise(rows):
        closed = "–" if line["closed"] is None else f"{100 * line['closed']:.0f} %"
        if line["method"] == "oracle" and line["seeds"] > 1:  # one seed cannot tell
            closed = f"gap {line['gap']:.3f}" if line["gap"] is not None else "no gap"
        effective = line["effective_workers"]
        cells.append(
            [
                line["scenario"], line["method"], str(line["seeds"]), number(line["loss"], line["error"]),
                "–" if line["method"] == "uniform" else number(line["gained"], line["gained_error"]), closed,
                "–" if effective is None else f"{100 * effective:.1f} %",
                number(line["lowest_good"], digits=2), number(line["highest_bad"], digits=2) if line["bad"] else "–",
            ]
        )  # fmt: skip
    return cells


def signal_table(rows: Sequence[Row]) -> Table:
    """One line for each scenario and method, means over seeds with 95 % confidence intervals."""
    table = Table(title=_title(rows), title_justify="left", caption_justify="left")
    table.caption = (
        "± half a 95 % interval. below uniform: paired by seed. effective: 1 / (P sum w²), mean over steps. "
        "lowest good, highest bad: the extreme weight of a clean and of a corrupted worker in any step, times P."
    )
    for i, heading in enumerate(_HEADING):
        table.add_column(heading, justify="left" if i < 2 else "right")
    before = None
    for cells in _cells(rows):
        if before not in (None, cells[0]):
            table.add_section()
        before = cells[0]
        table.add_row(*cells)
    return table


def signal_markdown(rows: Sequence[Row]) -> str:
    """The same for the docs."""
    lines = ["| " + " | ".join(_HEADING) + " |", "| --- | --- |" + " ---: |" * (len(_HEADING) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in _cells(rows))])


def _title(rows: Sequence[Row]) -> str:
    row = rows[0]
    compressed = f", density {100 * row['density']:g} %" if row["density"] else ""
    return (
        f"{row['data']}, GPT of {row['parameters']:,} weights, {row['steps']} steps of "
        f"{row['batch']} x {row['context']} tokens a worker{compressed}"
    )


# --- the figure ----------------------------------------------------------------------------------------------------

_UNIFORM, _ORACLE, _SIGNAL, _OTHER, _BAD = "#374151", "#d97706", "#0f766e", "#c7cdd6", "#c0392b"


def signal_figure(rows: Sequence[Row], path: Path) -> None:
    """A column for each scenario: above the losses, below the weights of the best signal's run over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    figure, axes = plt.subplots(2, len(scenarios), figsize=(3.9 * len(scenarios), 6.2), squeeze=False, sharex=True)
    for column, scenario in enumerate(scenarios):
        here = [row for row in rows if row["scenario"] == scenario]
        signals = [row for row in here if _is_signal(row)]
        best = min({row["method"] for row in signals}, key=lambda name: _mean_loss(here, name), default=None)
        _draw_losses(axes[0][column], here, best)
        _draw_weights(axes[1][column], [row for row in here if row["method"] == best])
        axes[0][column].set_title(scenario, fontsize=10)
        axes[1][column].set_xlabel("step")
    axes[0][0].set_ylabel("validation loss (nats a token)")
    axes[1][0].set_ylabel("weight times workers")
    figure.suptitle(_title(rows) + ".\nMeans over seeds; below, the weights that the best signal gives.", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _is_signal(row: Row) -> bool:
    from thinwire.aggregate import SIGNALS

    return set(row["method"].split("+")) <= set(SIGNALS)


def _mean_loss(rows: Sequence[Row], method: str) -> float:
    return float(mean(row["loss"] for row in rows if row["method"] == method))


def _steps(row: Row, points: int) -> list[int]:
    every = max(1, row["steps"] // points)
    return [every * (i + 1) for i in range(points)]


def _draw_losses(axis: Any, rows: Sequence[Row], best: str | None) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row["losses"] for row in rows if row["method"] == method]
        curve = [mean(values) for values in zip(*found, strict=True)]
        known = {"uniform": _UNIFORM, "oracle": _ORACLE, best: _SIGNAL}
        colour, front = known.get(method, _OTHER), method in known
        style = {"color": colour, "linewidth": 2 if front else 1, "zorder": 3 if front else 1}
        if method == "oracle":
            style["linestyle"] = "--"
        skip = len(curve) // 5  # the start, which all have in common, would flatten the rest
        axis.plot(_steps(rows[0], len(curve))[skip:], curve[skip:], label=method if front else None, **style)
    axis.plot([], [], color=_OTHER, linewidth=1, label="others")
    axis.legend(fontsize=7, frameon=False)
    axis.grid(alpha=0.25)


def _draw_weights(axis: Any, rows: Sequence[Row]) -> None:
    if not rows:
        return
    size, bad = rows[0]["workers"], rows[0]["bad"]
    points, highest = len(rows[0]["weights"]), 1.0
    for rank in range(size):
        curve = [size * mean(row["weights"][i][rank] for row in rows) for i in range(points)]
        colour, label = (_BAD, "corrupted") if rank >= size - bad else (_SIGNAL, "clean")
        highest = max(highest, *curve)
        first = rank in (0, size - bad)
        axis.plot(_steps(rows[0], points), curve, color=colour, linewidth=1.5, label=label if first else None)
    axis.axhline(1.0, color=_UNIFORM, linewidth=0.8, linestyle=":")
    axis.set_ylim(-0.05 * highest, 1.1 * highest)
    axis.legend(fontsize=7, frameon=False)
    axis.grid(alpha=0.25)


# --- the command ---------------------------------------------------------------------------------------------------

DEFAULT_SCENARIOS = "clean-2,swap30-1of2,swap100-1of2,repeat-1of2"


def signal(
    scenarios: Annotated[str, typer.Option(help="Names with commas between, or all.")] = DEFAULT_SCENARIOS,
    signals: Annotated[str, typer.Option(help="Signals to weight by; several together with + between.")] = "loss_ema",
    baselines: Annotated[bool, typer.Option(help="Run the other aggregators, too.")] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    data: Annotated[
        str | None, typer.Option(help="A text; default: tinyshakespeare if it is there, or grammar.")
    ] = None,
    model: Annotated[str, typer.Option(help="gpt-tiny or gpt-small.")] = "gpt-tiny",
    steps: Annotated[int, typer.Option(min=20)] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a worker and step.")] = 8,
    decay: Annotated[float, typer.Option(help="Of the signals' averages.")] = 0.9,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before anybody is judged.")] = 30,
    density: Annotated[
        float | None, typer.Option(help="Send this share of the gradient, by top-k with feedback.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Runs at a time; 0: one a core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file, as they come.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw curves and weights into this PNG file.")] = None,
) -> None:
    """Bad workers: weights by signals beside uniform, an oracle that drops the bad ones, and robust aggregators.

    Methods that look at whole gradients do without compression, so --density leaves them out.
    """
    from thinwire.bench.measure import write_rows
    from thinwire.bench.signal import SCENARIOS, SignalOptions, plan, run_all
    from thinwire.lab.text.config import SHAPES

    if model not in SHAPES:
        raise MisuseError(f"there is no model {model!r}; give one of {', '.join(SHAPES)}")
    shape = SHAPES[model]
    base = SignalOptions(
        data=data or _default_text(), layers=shape.layers, width=shape.width, heads=shape.heads, context=shape.context,
        steps=steps, batch=batch, rate=0.64 / shape.width, density=density,
        decay=decay, warmup=warmup,
    )  # fmt: skip
    names = list(SCENARIOS) if scenarios == "all" else _names(scenarios)
    runs = plan(base, names, _names(signals), seeds, baselines=baselines and density is None)
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=140)
    rows: list[Row] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(runs))

        def report(row: Row, done: int) -> None:
            rows.append(row)
            words = (
                f"{row['scenario']}, {row['method']}, seed {row['seed']}: {row['loss']:.4f} ({row['seconds']:.0f} s)"
            )
            progress.update(task, completed=done, description=words)
            if out is not None:
                write_rows(out, rows)

        rows = run_all(runs, jobs=jobs or os.cpu_count() or 1, report=report)
    console.print(signal_table(rows))
    if out is not None:
        write_rows(out, rows)
    if figure is not None:
        signal_figure(rows, figure)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _default_text() -> str:
    from thinwire.lab.text.sources import read_source

    try:
        read_source("tinyshakespeare", None)
    except MisuseError:
        return "grammar"
    return "tinyshakespeare"

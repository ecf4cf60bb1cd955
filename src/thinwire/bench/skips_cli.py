"""The command ``thinwire bench skips``: its table and its figure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

__all__ = ["skips", "skips_figure", "skips_markdown", "skips_table"]

Row = dict[str, Any]
_SHOWN = (1, 2, 4, 8, 16, 32, 64)
_HEADING = ("versions behind", "replay", "ladder: best", "median", "worst", "dense: worst", "hops, at most")


def _of(rows: Sequence[Row], kind: str, ladder: str = "ladder") -> list[Row]:
    return [row for row in rows if row["kind"] == kind and row.get("ladder", ladder) == ladder]


def _lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines = []
    for ladder, dense in zip(_of(rows, "behind"), _of(rows, "behind", "dense"), strict=True):
        if ladder["behind"] in _SHOWN:
            shares = (f"1/{1 / ladder[key]:.1f}" for key in ("share_best", "share_median", "share_worst"))
            worst = f"1/{1 / dense['share_worst']:.1f}"
            hops = f"{ladder['hops_max']}, {dense['hops_max']}"
            lines.append((str(ladder["behind"]), f"{ladder['replay_bytes'] / 1e3:,.0f} kB", *shares, worst, hops))
    return lines


def _extra(rows: Sequence[Row], ladder: str) -> float:
    """Bytes of all skip deltas, in those of the versions' own patches."""
    rungs = _of(rows, "rung", ladder)
    extra: float = sum(row["bytes_total"] for row in rungs if row["span"] > 1) / rungs[0]["bytes_total"]
    return extra


def skips_markdown(rows: Sequence[Row]) -> str:
    """The table of ``docs/skips.md``; a test holds the two together."""
    table = [_HEADING, ("---:",) * len(_HEADING), *_lines(rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def skips_table(rows: Sequence[Row]) -> Table:
    """One line for each number of versions behind."""
    table = Table(title=f"{rows[0]['source']}: share of the replay's bytes", title_justify="left")
    table.caption = (
        f"The skip deltas have {_extra(rows, 'ladder'):.2f} (ladder) and {_extra(rows, 'dense'):.2f} times (dense) the "
        "bytes of the versions' own patches."
    )
    for heading in _HEADING:
        table.add_column(heading, justify="right")
    for line in _lines(rows):
        table.add_row(*line)
    return table


def skips_figure(rows: Sequence[Row], path: Path) -> None:
    """Bytes and hops against versions behind: measured as markers, simulated as dashed lines. A PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    size_axis, hop_axis = figure.subplots(1, 2)
    measured, simulated = _of(rows, "behind"), _of(rows, "simulated")
    law = _of(rows, "model")[0]
    green, grey, blue = "#0b6e4f", "#6b7280", "#2f6fd8"
    gaps = [row["behind"] for row in measured]
    shown = [row for row in measured if row["behind"] & (row["behind"] - 1) == 0]
    points = [row["behind"] for row in shown]
    size_axis.fill_between(
        gaps,
        [row["share_best"] * row["replay_bytes"] / 1e6 for row in measured],
        [row["share_worst"] * row["replay_bytes"] / 1e6 for row in measured],
        color=green, alpha=0.18, linewidth=0, label="ladder, measured: best to worst place",
    )  # fmt: skip
    marks = {"linestyle": "none", "markersize": 6}
    size_axis.plot(points, [r["replay_bytes"] / 1e6 for r in shown], "s", color=grey, label="replay, measured", **marks)
    size_axis.plot(
        points, [r["ladder_bytes"] / 1e6 for r in shown], "o", color=green, label="ladder, measured: mean", **marks
    )
    dense = [row for row in _of(rows, "behind", "dense") if row["behind"] in points]
    size_axis.plot(
        points, [r["ladder_bytes"] / 1e6 for r in dense], "v", color="#c0392b", label="dense, measured: mean", **marks
    )
    far = [row["behind"] for row in simulated]
    size_axis.plot(far, [r["replay_bytes"] / 1e6 for r in simulated], "--", color=grey, label="replay, simulated")
    size_axis.plot(far, [r["ladder_bytes"] / 1e6 for r in simulated], "--", color=green, label="ladder, simulated")
    state = measured[0]["state_bytes"] / 1e6
    size_axis.axhline(state, color=blue, linewidth=1.4, label=f"an anchor of the newest version ({state:.3g} MB)")
    size_axis.set(ylabel="patches fetched (MB)", yscale="log", title="bytes to catch up")
    hop_axis.plot(points, [row["hops_max"] for row in shown], "o", color=green, label="measured, at most", **marks)
    hop_axis.plot(far, [row["hops_max"] for row in simulated], "--", color=green, label="simulated, at most")
    bound = [max(1, 2 * (gap.bit_length() - 1)) for gap in far]
    hop_axis.plot(far, bound, ":", color="black", label="2 log₂ of the versions behind, rounded down")
    hop_axis.set(ylabel="patches applied", title="hops")
    for axis in (size_axis, hop_axis):
        axis.set(xlabel="versions behind", xscale="log")
        axis.grid(True, alpha=0.2)
        axis.legend(fontsize=8.5, loc="upper left")
    size_axis.set_ylim(top=30 * max(row["replay_bytes"] / 1e6 for row in simulated))
    hop_axis.set_ylim(bottom=0)
    first = measured[0]
    figure.suptitle(
        f"{first['source']}, {first['versions_published']} versions. Simulated: skip deltas of "
        f"span$^{{{law['exponent']:.2f}}}$ times {law['first_bytes'] / 1e3:.0f} kB, no more than the state; at the "
        f"held-out span {law['held_out_span']} this is off by {100 * law['held_out_error']:+.0f} %.",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _states(model: str, steps: int, lr: float | None, seed: int) -> tuple[Iterator[dict[str, torch.Tensor]], str]:
    if model == "adam":
        from thinwire.bench.workloads import adam_versions

        rate = lr or 1e-6
        states = islice(adam_versions(16 << 20, rate, seed), steps + 1)
        return states, f"simulated Adam steps of 8.4 M weights, lr {rate:g}"
    from thinwire.lab.real import grpo_versions
    from thinwire.lab.recipes import RECIPES

    rate = lr or RECIPES[model]().lr
    return grpo_versions(model, steps, rate, seed), f"GRPO of {model}, lr {rate:g}"


def skips(
    model: Annotated[str, typer.Option(help="tiny, nano or smollm2 under GRPO, or adam: simulated steps.")] = "tiny",
    steps: Annotated[int, typer.Option(min=16, help="Versions after the first.")] = 64,
    lr: Annotated[float | None, typer.Option(help="Learning rate; the recipe's by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 1,
    longest: Annotated[int, typer.Option(min=64, help="Versions of the simulated chain.")] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw skips.png into this folder.")] = None,
    again: Annotated[Path | None, typer.Option(help="Measure nothing: simulate anew from rows in this file.")] = None,
) -> None:
    """Catching up by skip deltas, beside replay and anchors: a real chain, then a simulated one of any length."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.skips import run_skips, simulate
    from thinwire.errors import MisuseError

    console = Console(stderr=as_json)
    if model not in ("tiny", "nano", "smollm2", "adam"):
        raise MisuseError(f"model must be tiny, nano, smollm2 or adam, not {model!r}")
    if again is None:
        with console.status("publishing") as status:
            states, source = _states(model, steps, lr, seed)
            rows = run_skips(states, source=source, report=status.update)
    else:
        rows = [row for row in map(json.loads, again.read_text().splitlines()) if not row["simulated"]]
    rows += simulate(rows, longest)
    console.print(skips_table(rows))
    if figures is not None:
        skips_figure(rows, figures / "skips.png")
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

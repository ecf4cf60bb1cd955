"""The command ``thinwire bench fleet``: its table, its figure, and the table for the docs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["fleet", "fleet_figure", "fleet_markdown", "fleet_table"]

Row = dict[str, Any]
_HEADING = (
    "carrier", "p50, s", "p99, s", "p99/p50", "in a version (worst)", "wrong", "late", "objects a version",
    "requests a version", "idle requests a second",
)  # fmt: skip
_COLOURS = {"direct": "#6b7280", "cache": "#0b6e4f", "swarm": "#2f6fd8"}


def _lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for row in rows:
        asked = row["requests"]
        lines.append(
            (
                row["carrier"], f"{row['p50_s']:.2f}", f"{row['p99_s']:.2f}", f"{row['ratio']:.2f}",
                f"{median(row['ratio_by_version']):.2f} ({max(row['ratio_by_version']):.2f})",
                str(row["mismatches"]), str(row["missing"]), f"{asked['objects_per_version']:,.1f}",
                f"{asked['requests_per_version']:,.0f}", f"{asked['idle_per_s']:,.1f}",
            )
        )  # fmt: skip
    return lines


def fleet_markdown(rows: Sequence[Row]) -> str:
    """The table of ``docs/fleet.md``; a test holds the two together."""
    table = [_HEADING, ("---", *["---:"] * (len(_HEADING) - 1)), *_lines(rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def fleet_table(rows: Sequence[Row]) -> Table:
    """One line for each carrier."""
    first = rows[0]
    table = Table(
        title=f"{first['consumers']} consumers on {first['machines']} machines of {first['machine']['cores']} cores in "
        f"all; {first['server']}; from commit to proof",
        title_justify="left",
    )
    for heading in _HEADING:
        table.add_column(heading, justify="left" if heading == "carrier" else "right")
    for line in _lines(rows):
        table.add_row(*line)
    return table


def fleet_figure(rows: Sequence[Row], path: Path) -> None:
    """Share of the consumers that have proved a version against the time since its commit. A PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        values, colour = row["quantiles_s"], _COLOURS.get(row["carrier"], "black")
        label = f"{row['carrier']}: p50 {row['p50_s']:.2f} s, p99 {row['p99_s']:.2f} s"
        axis.plot(values, range(len(values)), color=colour, linewidth=2, label=label)
        axis.plot([row["p50_s"], row["p99_s"]], [50, 99], "o", color=colour, markersize=5)
    first = rows[0]
    axis.set(
        xlabel="seconds since the version was committed",
        ylabel="consumers that have proved it (%)",
        xlim=(0, None),
        ylim=(0, 101),
    )
    axis.set_title(
        f"{first['consumers']:,} consumers, {first['machines']} processes as machines, on {first['machine']['cores']} "
        f"cores in all; {first['server']};\n{100 * first['share']:g} % of replies damaged; each consumer looks every "
        f"{first['poll_s']:g} s; state {first['state_bytes'] >> 10} KiB, {first['versions']} versions",
        fontsize=10,
    )
    axis.grid(True, alpha=0.2)
    axis.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def fleet(
    consumers: Annotated[int, typer.Option(min=1, help="Consumers in all.")] = 1000,
    machines: Annotated[int, typer.Option(min=1, help="Processes that stand for machines; divides --consumers.")] = 8,
    versions: Annotated[int, typer.Option(min=1, help="Versions after the first.")] = 10,
    carriers: Annotated[str, typer.Option(help="direct, cache, swarm, with commas between.")] = "direct,cache",
    poll: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks of a consumer, on average.")] = 5.0,
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of replies that are corrupted or cut.")] = 0.01,
    state: Annotated[str, typer.Option(help="Bytes of a consumer's state.")] = "256KiB",
    server: Annotated[str, typer.Option(help="radosgw, moto, http (a folder), or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights and faults.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw fleet.png into this folder.")] = None,
) -> None:
    """A thousand consumers of one chain, through a line that damages replies; ends with 1 if any state is wrong.

    Small, to try it: --consumers 40 --machines 4 --versions 3 --poll 1 --server http
    """
    from thinwire.bench.fleet import FleetOptions, run_fleet
    from thinwire.bench.measure import parse_size, write_rows

    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=132)
    options = FleetOptions(
        consumers, machines, versions, parse_size(state), poll_s=poll, share=share, server=server, seed=seed
    )
    names = [word.strip() for word in carriers.split(",") if word.strip()]
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        if out is not None:
            write_rows(out, rows)

    with tempfile.TemporaryDirectory() as folder, console.status("starting the server") as status:
        run_fleet(Path(folder), names, options, report=status.update, keep=keep)
    console.print(fleet_table(rows))
    for row in rows:
        if row["errors"]:
            console.print(f"{row['carrier']}: looks that ended with an error and were repeated: {row['errors']}")
    if figures is not None:
        fleet_figure(rows, figures / "fleet.png")
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))
    if any(row["mismatches"] or row["missing"] for row in rows):
        console.print("[bold red]A consumer held something else than was published, or was left behind.[/bold red]")
        raise typer.Exit(1)

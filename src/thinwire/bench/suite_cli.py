"""The command ``thinwire bench merge-suite``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["merge_suite", "suite_markdown", "suite_table"]

Row = dict[str, Any]


def _lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    heading = ["model", *rows[0]["tasks"], "average", "spread"]
    lines = []
    for row in rows:
        shares = [*row["tasks"].values(), row["mean"], row["sd"]]
        lines.append([row["model"], *(f"{100 * share:.1f}" for share in shares)])
    return heading, lines


def suite_markdown(rows: Sequence[Row]) -> str:
    """The table of ``docs/switching.md``; a test holds the two together."""
    heading, lines = _lines(rows)
    found = [heading, ["---", *["---:"] * (len(heading) - 1)], *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in found)


def suite_table(rows: Sequence[Row]) -> Table:
    """One line a model: accuracy in %, task by task."""
    heading, lines = _lines(rows)
    table = Table(title=f"Accuracy on unseen pairs, %, {len(rows[0]['seeds'])} seeds", title_justify="left")
    for i, name in enumerate(heading):
        table.add_column(name, justify="right" if i else "left")
    for line in lines:
        table.add_row(*line, style="bold" if line[0] == "router" else "")
    return table


def merge_suite(
    base_steps: Annotated[int, typer.Option(min=1, help="Training steps of the base, on all tasks.")] = 60,
    expert_steps: Annotated[int, typer.Option(min=1, help="Training steps of each expert, on its task.")] = 300,
    density: Annotated[float, typer.Option(help="Share of the weights that an expert trains.")] = 0.1,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    method: Annotated[list[str] | None, typer.Option(help="A merge method; several; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Experts on four small tasks, what each merge method makes of them, and the router, side by side."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.suite import SuiteOptions, run_suite
    from thinwire.merge.methods import METHODS

    options = SuiteOptions(base_steps, expert_steps, density, tuple(range(seeds)), tuple(method or METHODS))
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=120)
    with console.status("training") as status:
        rows = run_suite(options, report=status.update)
    console.print(suite_table(rows))
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

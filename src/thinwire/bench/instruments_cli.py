"""The command ``thinwire bench instruments``, and its tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["instruments", "instruments_markdown", "instruments_tables"]

Row = dict[str, Any]
Grid = tuple[str, list[str], list[list[str]]]


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


def _grids(rows: Sequence[Row]) -> list[Grid]:
    """Titles, headings and cells of the tables that the rows make."""
    grids: list[Grid] = []
    found = _of(rows, "comparison")
    if found:
        lines = [[row["what"], f"{row['gb_s']:.1f}"] for row in found]
        grids.append((f"comparing {found[0]['elements'] / 1e6:.0f} M bf16 weights", ["", "GB/s"], lines))
    found = _of(rows, "overhead")
    if found:
        columns = list(dict.fromkeys((row["weights"], row["tokens"]) for row in found))
        lines = []
        for what in dict.fromkeys(row["what"] for row in found):
            by = {(row["weights"], row["tokens"]): row for row in found if row["what"] == what}
            size = "/".join(dict.fromkeys(f"{row['bytes_per_parameter']:.0f}" for row in by.values()))
            lines.append([what, *(_percent(by[column]["share"]) for column in columns), size])
        heading = [
            "% of a training step",
            *(f"{weights}, {tokens} tokens" for weights, tokens in columns),
            "bytes a weight",
        ]
        grids.append((f"a tracker beside a Llama of {found[0]['parameters'] / 1e6:.1f} M weights", heading, lines))
    found = _of(rows, "null, first step")
    if found:
        lines = []
        for weights, what in dict.fromkeys((row["weights"], row["what"]) for row in found):
            mine = [row for row in found if (row["weights"], row["what"]) == (weights, what)]
            worst = [max(100 * abs(row[key] - row["observed"]) for row in mine) for key in ("null", "null_with_sizes")]
            lines.append(
                [what, weights, " / ".join(_percent(row["observed"]) for row in mine), *(f"{w:.2f}" for w in worst)]
            )
        heading = ["", "weights", "changed, %", "null off by at most", "with the gradients' sizes"]
        grids.append(("the null of the first step, at three learning rates", heading, lines))
    found = _of(rows, "null, later steps")
    if found:
        steps = list(dict.fromkeys(row["step"] for row in found))
        lines = []
        for weights, what in dict.fromkeys((row["weights"], row["what"]) for row in found):
            by = {row["step"]: row for row in found if (row["weights"], row["what"]) == (weights, what)}
            lines.append(
                [what, weights, *(f"{_percent(by[s]['observed'])} / {_percent(by[s]['null'])}" for s in steps)]
            )
        heading = ["changed / null, %", "weights", *(f"step {step}" for step in steps)]
        grids.append(("real training beside the null", heading, lines))
    found = _of(rows, "rank")
    if found:
        lines = []
        for row in found:
            lines.append([
                f"{row['rows']} × {row['columns']}, {row['spectrum']}", row["what"], f"{row['full']:.1f}",
                f"{row['error']:.2%}", f"{row['svdvals_s'] / row['seconds']:.1f}",
                f"{row['svd_s'] / row['seconds']:.1f}",
            ])  # fmt: skip
        heading = ["", "rank", "by the full SVD", "off by", "× faster than svdvals", "than svd"]
        grids.append(("effective ranks", heading, lines))
    return grids


def instruments_markdown(rows: Sequence[Row], part: str) -> str:
    """The table of one part, as it stands in ``docs/probing.md``; a test holds the two together."""
    ((_, heading, lines),) = _grids(_of(rows, part))
    cells = [heading, ["---", *["---:"] * (len(heading) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def instruments_tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each part that was measured."""
    tables = []
    for title, heading, lines in _grids(rows):
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(heading):
            table.add_column(name, justify="right" if i else "left")
        for line in lines:
            table.add_row(*line)
        tables.append(table)
    return tables


def instruments(
    parts: Annotated[str, typer.Option(help="Names with commas between: compare, overhead, null, rank.")] = "",
    elements: Annotated[int, typer.Option(min=64, help="Weights to compare.")] = 64_000_000,
    null_steps: Annotated[int, typer.Option(min=1, help="Steps of real training beside the null.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the best or the median is kept.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """What the instruments cost and how right they are: comparison, trackers, the null, ranks. One thread."""
    from thinwire.bench.instruments import PARTS, InstrumentOptions, run_instruments
    from thinwire.bench.measure import write_rows

    names = tuple(name.strip() for name in parts.split(",") if name.strip()) or tuple(PARTS)
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=132)
    options = InstrumentOptions(elements=elements, null_steps=null_steps, repeats=repeats)
    with console.status("measuring") as status:
        rows = run_instruments(names, options, report=status.update)
    for table in instruments_tables(rows):
        console.print(table)
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

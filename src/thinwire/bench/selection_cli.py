"""The command ``thinwire bench selection``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["selection", "selection_table"]

Row = dict[str, Any]


def selection_table(rows: Sequence[Row]) -> Table:
    """One line a row: best milliseconds (median), and how many times faster than torch's."""
    table = Table(title="Exact top-k by magnitude, best (median) ms", title_justify="left", caption_justify="left")
    table.caption = "×: torch's time over ours, both best. A read pass is the least that any exact selection must do."
    table.add_column("values")
    names = ("read", "copy", "torch.topk", "numpy.argpartition", "top_k", "top_k, hint")
    for heading in ("k", "threads", *names, "×", "accumulate", "×", "fill", "×"):
        table.add_column(heading, justify="right")
    for row in rows:

        def shown(name: str, row: Row = row) -> str:
            best, middle = row["best_s"].get(name), row["median_s"].get(name)
            return "–" if best is None else f"{1000 * best:.3g} ({1000 * middle:.3g})"

        times = {name: f"{ratio:.1f}" for name, ratio in row["times_faster"].items()}
        table.add_row(
            f"{row['distribution']} {row['numel'] / 1e6:g} M", f"{row['density']:.2%}", str(row["threads"]),
            *map(shown, names), times["top_k"],
            shown("accumulate_top_k"), times["accumulate_top_k"], shown("fill_sparse_"), times["fill_sparse_"],
        )  # fmt: skip
    return table


def selection(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    numel: Annotated[int, typer.Option(min=1000, help="Elements, fp32.")] = 25_000_000,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; best and median are shown.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the values.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Exact top-k selection beside torch.topk, numpy.argpartition and a plain pass over memory."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.selection import SelectionOptions, run_selection

    options = SelectionOptions(device=device, numels=(numel,), repeats=repeats, seed=seed)
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=160)
    with console.status("selecting") as status:
        rows = run_selection(options, report=status.update)
    console.print(selection_table(rows))
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

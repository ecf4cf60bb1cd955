"""The command ``thinwire bench sharded``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["sharded", "sharded_lines"]


def sharded_lines(rows: list[dict[str, object]]) -> list[str]:
    """The table of the documentation: MB, and shares of what a whole model fetches."""
    lines = [
        "| level | slices | reader | holds | fetches to load | for a version | of the whole's | beside |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    whole = {(r["level"], r["slices"]): int(str(r["delta_bytes"])) for r in rows if r["reader"] == "whole"}
    for row in rows:
        held, load, delta, beside = (
            int(str(row[name])) for name in ("reader_bytes", "load_bytes", "delta_bytes", "beside_bytes")
        )
        share = delta / whole[row["level"], row["slices"]]
        lines.append(
            f"| {row['level']} | {row['slices']} | {row['reader']} | {held / 1e6:.1f} MB | {load / 1e6:.1f} MB "
            f"| {delta / 1e3:,.0f} kB | {100 * share:.0f} % | {beside / 1e6:.1f} MB |"
        )
    return lines


def sharded(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 8,
    width: Annotated[int, typer.Option(min=64, help="Its width.")] = 768,
    density: Annotated[float, typer.Option(min=0, max=1, help="Share of the elements that change.")] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """What readers of slices of a sharded model fetch, by how it was cut."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.sharded import measure

    rows = list(measure(layers=layers, width=width, density=density))
    console = Console(stderr=as_json, soft_wrap=True)
    for line in sharded_lines(rows):
        console.print(line)
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

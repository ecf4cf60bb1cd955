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
        "| slices | group, cells | reader | holds | fetches to load | for a version | of the whole's | beside |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    whole = {(r["slices"], r["group_cells"]): int(str(r["delta_bytes"])) for r in rows if r["reader"] == "whole"}
    for row in rows:
        held, load, delta, beside = (
            int(str(row[name])) for name in ("reader_bytes", "load_bytes", "delta_bytes", "beside_bytes")
        )
        share = delta / whole[row["slices"], row["group_cells"]]
        cells = int(str(row["group_cells"]))
        lines.append(
            f"| {row['slices']} | {_short(cells)} | {row['reader']} | {held / 1e6:.1f} MB | {load / 1e6:.1f} MB "
            f"| {delta / 1e3:,.0f} kB | {100 * share:.0f} % | {beside / 1e6:.1f} MB |"
        )
    return lines


def _short(cells: int) -> str:
    for power, unit in ((20, "Mi"), (10, "Ki")):
        if cells >= 1 << power and cells % (1 << power) == 0:
            return f"{cells >> power} {unit}"
    return str(cells)


def sharded(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 8,
    width: Annotated[int, typer.Option(min=64, help="Its width.")] = 768,
    density: Annotated[float, typer.Option(min=0, max=1, help="Share of the elements that change.")] = 0.01,
    slices: Annotated[list[int] | None, typer.Option(min=1, help="Cut for so many (again for more).")] = None,
    group_cells: Annotated[
        list[int] | None, typer.Option(min=1, help="Cells after which a group ends (again for more).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """What readers of slices of a sharded model fetch, by how it was cut."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.sharded import measure
    from thinwire.sync.chunking import GROUP_CELLS

    cuts, cells = slices or (1, 4, 8), group_cells or (GROUP_CELLS,)
    rows = list(measure(layers=layers, width=width, density=density, slices=cuts, group_cells=cells))
    console = Console(stderr=as_json, soft_wrap=True)
    for line in sharded_lines(rows):
        console.print(line)
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

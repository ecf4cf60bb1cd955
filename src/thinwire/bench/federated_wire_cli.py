"""The command ``thinwire bench federated-wire``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["federated_wire"]


def federated_wire(
    numel: Annotated[int, typer.Option(min=1000, help="Elements of the largest update.")] = 10_000_000,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Sizes of federated updates beside their entropy."""
    from thinwire.bench.federated_wire import wire_rows
    from thinwire.bench.measure import write_rows

    wire_rows([numel // 10], [0.01], ["float16"])  # compiles
    rows = wire_rows([numel // 10, numel], [0.001, 0.01, 0.05], ["float32", "float16", "bfloat16", "int8"])
    table = Table(title="An update on the wire, header included", title_justify="left")
    for heading in ("elements", "density", "values", "bytes an element", "floor", "of it", "× less than dense"):
        table.add_column(heading, justify="left" if heading == "values" else "right")
    for row in rows:
        table.add_row(
            f"{row['numel']:,}", f"{row['density']:.1%}", row["values"], f"{row['bytes_per_element']:.5f}",
            f"{row['floor']:.5f}", f"{row['of_floor']:.0%}", f"{row['times_less_than_float32']:.0f}",
        )  # fmt: skip
    Console(width=132).print(table)
    if out is not None:
        write_rows(out, rows)

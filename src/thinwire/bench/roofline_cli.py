"""The command ``thinwire bench roofline``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["roofline"]


def roofline(
    numel: Annotated[int, typer.Option(min=1000, help="Elements, fp32; 100 million take 2 GB.")] = 100_000_000,
    densities: Annotated[str, typer.Option(help="Shares, with commas between.")] = "0.001,0.003,0.01,0.03,0.1",
    threads: Annotated[int, typer.Option(min=1, help="Of all that is measured.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the best counts.")] = 7,
    figure: Annotated[Path | None, typer.Option(help="Draw the roofs and the steps under them, as a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """The sparse step beside what this machine's memory allows."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.roofline import RooflineOptions, roofline_table, run_roofline
    from thinwire.errors import MisuseError

    try:
        shares = tuple(float(word) for word in densities.split(","))
    except ValueError:
        raise MisuseError(f"not densities: {densities!r}; write them as 0.001,0.01") from None
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=132)
    with console.status("measuring") as status:
        rows = run_roofline(RooflineOptions(numel, shares, threads, repeats), report=status.update)
    console.print(roofline_table(rows))
    if out is not None:
        write_rows(out, rows)
    if figure is not None:
        from thinwire.bench.roofline_figure import roofline_figure

        roofline_figure(rows, figure)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

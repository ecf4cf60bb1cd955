"""The command ``thinwire bench predictive``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["predictive"]


def predictive(
    layers: Annotated[int, typer.Option(min=1, help="Linear layers, GELU between.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Of every layer.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the input.")] = 256,
    rows: Annotated[float, typer.Option(help="Share of the weights' rows that is active.")] = 0.125,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; best and median are shown.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Backward with the weight gradients of few rows beside the dense one, on one thread."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.predictive import PredictiveOptions, predictive_table, run_predictive

    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=132)
    with console.status("measuring") as status:
        found = run_predictive(PredictiveOptions(layers, width, batch, rows, repeats), report=status.update)
    console.print(predictive_table(found))
    if out is not None:
        write_rows(out, found)
    if as_json:
        for row in found:
            typer.echo(json.dumps(row, sort_keys=True))

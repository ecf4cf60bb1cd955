"""The command ``thinwire bench convergence``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["convergence"]


def convergence(
    horizons: Annotated[str, typer.Option(help="Steps of the runs, with commas between.")] = "250,1000,4000",
    seeds: Annotated[int, typer.Option(min=1, help="Runs that are averaged.")] = 2,
    density: Annotated[float, typer.Option(help="Share of cells that a sparse step moves.")] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Rates of sparse steps, with and without error feedback, on two problems that mislead those without."""
    from thinwire.bench.convergence import ConvergenceOptions, convergence_table, run_convergence
    from thinwire.bench.measure import write_rows
    from thinwire.errors import MisuseError

    try:
        steps = tuple(int(word) for word in horizons.split(","))
    except ValueError:
        raise MisuseError(f"not numbers of steps: {horizons!r}; write them as 250,500,1000") from None
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=132)
    with console.status("stepping") as status:
        rows = run_convergence(ConvergenceOptions(steps, seeds, density), report=status.update)
    console.print(convergence_table(rows))
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

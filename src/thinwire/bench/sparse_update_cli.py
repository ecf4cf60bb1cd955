"""The command ``thinwire bench sparse-update``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["sparse_update"]


def sparse_update(
    numel: Annotated[int, typer.Option(min=1000, help="Elements, fp32; 100 million take 3 GB.")] = 100_000_000,
    densities: Annotated[str, typer.Option(help="Shares that are active, with commas between.")] = "0.001,0.01,0.1",
    refresh_every: Annotated[int, typer.Option(min=1, help="Steps between selections.")] = 100,
    threads: Annotated[int, typer.Option(min=1, help="Of both optimisers.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; best and median are shown.")] = 7,
    seed: Annotated[int, typer.Option(help="Seed of weights and gradients.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """ASPG's step beside torch's fused AdamW: time with selections counted in, and bytes of state."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.sparse_update import SparseUpdateOptions, run_sparse_update, sparse_update_table
    from thinwire.errors import MisuseError

    try:
        shares = tuple(float(word) for word in densities.split(","))
    except ValueError:
        raise MisuseError(f"not densities: {densities!r}; write them as 0.001,0.01") from None
    options = SparseUpdateOptions(numel, shares, refresh_every, threads, repeats, seed)
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=132)
    with console.status("stepping") as status:
        rows = run_sparse_update(options, report=status.update)
    console.print(sparse_update_table(rows))
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

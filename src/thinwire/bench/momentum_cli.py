"""The command ``thinwire bench momentum``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["momentum"]


def momentum(
    model: Annotated[str, typer.Option(help="nano, tiny or smollm2.")] = "nano",
    steps: Annotated[int, typer.Option(min=2, help="GRPO steps.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-5,
    seed: Annotated[int, typer.Option(help="Seed of the trainer.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """What a patch would have left if steps were predicted from the steps before: measured, not in the format."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.momentum import momentum_table, run_momentum
    from thinwire.errors import MisuseError
    from thinwire.lab.real import grpo_versions, smollm2_grpo_versions
    from thinwire.lab.recipes import RECIPES

    if model not in RECIPES:
        raise MisuseError(f"model must be one of {', '.join(RECIPES)}, not {model!r}")
    states = smollm2_grpo_versions(steps, lr, seed) if model == "smollm2" else grpo_versions(model, steps, lr, seed)
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=132)
    with console.status("training") as status:
        rows = list(run_momentum(states, f"{model}, GRPO, lr {lr:g}", report=status.update))
    console.print(momentum_table(rows))
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

"""The command ``thinwire bench merge``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["merge", "merge_table"]


def merge_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a method: best seconds, extra resident memory, ratios."""
    first = rows[0]
    title = (
        f"Merging {first['tasks']} fine-tunes of {first['numel'] / 1e6:g} M weights, "
        f"{first['density']:.2%} changed in each"
    )
    table = Table(title=title, title_justify="left", caption_justify="left")
    stored = first["bytes_per_changed"]
    table.caption = (
        f"dense: {first['dense']}, best times; memory: resident above the start, mapped pages included.\n"
        f"A changed weight is stored in {stored['ulp']:.2f} bytes as a step, in {stored['absolute']:.2f} as a value."
    )
    for heading in ("method", "dense s", "sparse s", "× faster", "dense MB", "sparse MB", "× less", "same bits"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        memory = [f"{row['extra_bytes'][k] / 1e6:.0f}" if row["extra_bytes"][k] else "–" for k in ("dense", "sparse")]
        table.add_row(
            row["method"], f"{row['best_s']['dense']:.2f}", f"{row['best_s']['sparse']:.2f}",
            f"{row['times_faster']:.1f}", *memory, f"{row['times_less']:.1f}" if row["times_less"] else "–",
            f"{row['same_bits']:.3%}",
        )  # fmt: skip
    return table


def merge(
    numel: Annotated[int, typer.Option(min=4096, help="Weights of the base, bf16.")] = 100_000_000,
    tasks: Annotated[int, typer.Option(min=1, max=64, help="Fine-tunes to merge.")] = 8,
    density: Annotated[float, typer.Option(min=0.0001, max=1, help="Share of weights that each changes.")] = 0.01,
    keep: Annotated[float, typer.Option(min=0, max=1, help="Density that TIES trims to.")] = 0.005,
    methods: Annotated[str, typer.Option(help="Names with commas between.")] = "task_arithmetic,ties,sce,ram",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; best and median are kept.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Merging in sparse space beside mergekit's dense way: time, memory, bytes stored."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.merge import MergeOptions, run_merge

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=132)
    with console.status("merging") as status:
        rows = run_merge(MergeOptions(numel, tasks, density, keep, names, repeats, seed), report=status.update)
    console.print(merge_table(rows))
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

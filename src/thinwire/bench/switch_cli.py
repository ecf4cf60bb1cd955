"""The command ``thinwire bench switch``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["switch", "switch_markdown", "switch_table"]

Row = dict[str, Any]

_LINES = (
    ("thinwire", "base to task", "enter", "enter"),
    ("thinwire", "task to base", "leave", "leave"),
    ("thinwire", "task to task", "task to task", "task to task"),
    ("PEFT LoRA", "merge", "merge", ""),
    ("PEFT LoRA", "unmerge", "unmerge", ""),
    ("PEFT LoRA", "unmerge, merge another", "switch", ""),
    ("torch", "copy of all weights", "copy", ""),
)


def _lines(row: Row) -> list[list[str]]:
    lines = []
    for who, what, name, ratio in _LINES:
        times = f"{row['times_faster'][ratio]:.1f}" if ratio else ""
        lines.append([who, what, f"{1000 * row['best_s'][name]:.1f}", f"{1000 * row['median_s'][name]:.1f}", times])
    return lines


_HEADING = ("", "switch", "best ms", "median ms", "times as fast as LoRA")


def switch_markdown(row: Row) -> str:
    """The table of ``docs/switching.md``; a test holds the two together."""
    rows = [_HEADING, ("---", "---", *["---:"] * 3), *_lines(row)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def switch_table(row: Row) -> Table:
    """One line a kind of switch."""
    title = (
        f"{row['weights'] / 1e6:.3g} M weights in bf16, {row['changed'] / 1e6:.3g} M changed, {row['threads']} threads"
    )
    table = Table(title=title, title_justify="left", caption_justify="left")
    lora, sums = row["lora"], row["arithmetic"]
    table.caption = (
        f"Wrong weights after going there and back: thinwire 0 ({row['digests_equal']} digests of the base after "
        f"{row['switches']} switches), LoRA rank {lora['rank']} {lora['wrong_share_after_one']:.1%} after one merge, "
        f"{lora['wrong_share_at_end']:.1%} after {lora['merges']}; adding and subtracting bf16 differences "
        f"{sums['base_wrong_share']:.1%} of the touched ones."
    )
    for i, heading in enumerate(_HEADING):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for line in _lines(row):
        table.add_row(*line)
    return table


def switch(
    size: Annotated[str, typer.Option(help="tiny, 0.1b or 0.5b: the shapes of a Qwen2 model.")] = "0.5b",
    density: Annotated[float, typer.Option(help="Share of the weights that a task changes.")] = 0.01,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapters beside it.")] = 16,
    switches: Annotated[int, typer.Option(min=0, help="Random switches before the last digest.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; best and median are shown.")] = 7,
    seed: Annotated[int, typer.Option(help="Seed of weights, tasks and switches.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Switching tasks in place beside merging LoRA adapters (PEFT) and copying whole models."""
    from thinwire.bench.measure import write_rows
    from thinwire.bench.switch import SwitchOptions, run_switch

    options = SwitchOptions(size, density, rank, switches, repeats, seed)
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=120)
    with console.status("switching") as status:
        rows: Sequence[Row] = run_switch(options, report=status.update)
    for row in rows:
        console.print(switch_table(row))
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

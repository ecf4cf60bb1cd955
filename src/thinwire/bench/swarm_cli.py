"""The command ``thinwire bench swarm``, and its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["swarm", "swarm_markdown", "swarm_table"]

_NAMES = {"store": "all from the store", "swarm": "swarm", "orphans": "swarm, trainer seeds nothing"}
_HEADING = (
    "version", "way", "store sent, payloads", "trainer seeded", "a consumer sent, at most", "median, s", "last, s",
)  # fmt: skip


def _lines(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    lines = []
    for kind in ("anchor", "delta"):
        for way in _NAMES:
            found = [row for row in rows if (row["kind"], row["way"]) == (kind, way)]
            if not found:
                continue
            payload = median(row["payload_bytes"] for row in found) / 1e6
            about = f"{kind}, {payload:.1f} MB" + (f" (median of {len(found)})" if len(found) > 1 else "")
            figures = [median(row[name] for row in found) for name in ("store_sent", "trainer_seeded")]
            sent = max(row["consumers_sent_max"] for row in found)
            late = [median(row[name] for row in found) for name in ("median_s", "last_s")]
            lines.append((about, _NAMES[way], *(f"{f:.2f}" for f in (*figures, sent)), *(f"{s:.1f}" for s in late)))
    return lines


def swarm_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of ``docs/peers.md``; a test holds the two together."""
    table = [_HEADING, ("---", "---", *("---:",) * 5), *_lines(rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def swarm_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line for each kind of version and way."""
    first = rows[0]
    table = Table(title=f"{first['consumers']} consumers, every host behind {first['rate']}", title_justify="left")
    table.caption = f"mismatches: {sum(row['mismatches'] for row in rows)}"
    for n, heading in enumerate(_HEADING):
        table.add_column(heading, justify="left" if n < 2 else "right")
    for line in _lines(rows):
        table.add_row(*line)
    return table


def swarm(
    consumers: Annotated[int, typer.Option(min=1, max=240, help="Processes that follow, each on a host.")] = 16,
    rate: Annotated[str, typer.Option(help="Of every host's line: 100mbit, 1gbit, none.")] = "100mbit",
    model: Annotated[str, typer.Option(help="Bytes of the model.")] = "16MiB",
    versions: Annotated[int, typer.Option(min=0, help="Versions after the first.")] = 3,
    density: Annotated[float, typer.Option(help="Share of weights that change in each.")] = 0.3,
    ways: Annotated[
        str, typer.Option(help="store, swarm, orphans (a trainer that seeds nothing).")
    ] = "store,swarm,orphans",
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """What leaves a store when many follow: all from it, and by swarm. Needs root, for a network of limited lines."""
    from thinwire.bench.measure import parse_size, write_rows
    from thinwire.bench.net.namespaces import SlowNetwork
    from thinwire.bench.swarm import run_swarm

    console = Console(stderr=as_json)
    reason = SlowNetwork.why_not()
    if reason is not None:
        console.print(f"skipped: no slow network here, {reason}", soft_wrap=True)
        return
    with console.status("starting") as status:
        rows = run_swarm(
            consumers=consumers, rate=rate, model_bytes=parse_size(model), densities=[density] * versions,
            ways=ways.split(","), report=status.update,
        )  # fmt: skip
    console.print(swarm_table(rows))
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))
    if any(row["mismatches"] for row in rows):
        raise typer.Exit(1)

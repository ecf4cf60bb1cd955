"""How fast carriers move an object from one process to another on this machine, beside a copy of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["carriers", "carriers_markdown", "run_carriers"]

_WAYS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "a copy in memory": ("copy", {}),
    "a folder as store": ("folder", {}),
    "collective (gloo)": ("collective", {}),
    "swarm (TCP)": ("swarm", {}),
    "NIXL (shared memory)": ("nixl", {}),
    "NIXL (TCP)": ("nixl", {"UCX_TLS": "tcp"}),
    "Mooncake (TCP)": ("mooncake", {"GLOG_minloglevel": "2"}),
}
_PACKAGES = {"swarm": "libtorrent", "nixl": "nixl_cu12", "mooncake": "mooncake"}
_HEADING = ("way", "GB/s, median", "best", "of a copy")


def run_carriers(
    size: int, runs: int, *, ways: Sequence[str] = tuple(_WAYS), report: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One row for each way whose package is installed: seconds of each fetch of ``size`` bytes, from key to ``bytes``.

    Raises:
        MisuseError: bytes came that were not sent.
        RankError: a process failed.
    """
    from thinwire.bench.measure import load, machine, versions
    from thinwire.bench.net.launch import launch

    rows, about = [], {"load": load(), "machine": machine(), "versions": versions()}
    for way in ways:
        carrier, environment = _WAYS[way]
        if carrier in _PACKAGES and find_spec(_PACKAGES[carrier]) is None:
            report(f"{way}: not installed")
            continue
        report(way)
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            _, took = launch(
                "thinwire.bench.carriers_worker", [carrier, folder, str(size), str(runs + 1)],
                ranks=2, env=environment, timeout_s=300.0,
            )  # fmt: skip
        kept = took[1:]  # the first one opens connections
        rows.append(
            {
                "bench": "carriers", "way": way, "bytes": size, "first_s": took[0], "runs_s": kept,
                "median_gb_s": size / median(kept) / 1e9, "best_gb_s": size / min(kept) / 1e9, **about,
            }
        )  # fmt: skip
    return rows


def _lines(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    copy = next((row["median_gb_s"] for row in rows if row["way"] == "a copy in memory"), float("nan"))
    return [
        (row["way"], f"{row['median_gb_s']:.2f}", f"{row['best_gb_s']:.2f}", f"{100 * row['median_gb_s'] / copy:.0f} %")
        for row in rows
    ]


def carriers_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of ``docs/peers.md``; a test holds the two together."""
    table = [_HEADING, ("---", *("---:",) * 3), *_lines(rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def carriers(
    size: Annotated[str, typer.Option(help="Bytes of the object.")] = "64MiB",
    runs: Annotated[int, typer.Option(min=1, help="Objects, one after the other; best and median are shown.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """GB/s from one process to another by every carrier that is installed, beside a copy."""
    from thinwire.bench.measure import parse_size, write_rows

    console = Console(stderr=as_json)
    with console.status("starting") as status:
        rows = run_carriers(parse_size(size), runs, report=status.update)
    table = Table(title=f"{size} from one process to another", title_justify="left")
    for n, heading in enumerate(_HEADING):
        table.add_column(heading, justify="left" if n < 1 else "right")
    for line in _lines(rows):
        table.add_row(*line)
    console.print(table)
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

"""The command ``thinwire bench link``."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["link"]


def link(
    rows: Annotated[
        Path | None, typer.Option(help="Rows of thinwire bench codec --out; by default codecs are measured now.")
    ] = None,
    size: Annotated[str, typer.Option(help="Bytes of one version, if codecs are measured now.")] = "256MiB",
    densities: Annotated[
        str, typer.Option(help="Shares of weights that change, with commas between.")
    ] = "0.002,0.01,0.05",
    workload: Annotated[str, typer.Option(help="ulp or adam.")] = "adam",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the best counts.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="0: one a core.")] = 0,
    figures: Annotated[Path | None, typer.Option(help="Draw a PNG for each workload into this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """From which link on which level pays: codecs measured, transfers computed."""
    from thinwire.bench.link import link_rows, link_table, link_text
    from thinwire.bench.measure import write_rows

    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=132)
    if rows is not None:
        codec = [json.loads(line) for line in rows.read_text().splitlines()]
    else:
        codec = _measure(console, size, densities, workload, repeats, threads)
    found = link_rows(codec)
    for (name, density), group in itertools.groupby(found, key=lambda row: (row["workload"], row["density"])):
        part = list(group)
        console.print(link_table(part))
        console.print(f"thinwire: {link_text(part)}.", highlight=False)
        if figures is not None:
            from thinwire.bench.link_figure import link_figure

            figures.mkdir(parents=True, exist_ok=True)
            link_figure(part, figures / f"link-{name}-{density:g}.png")
    if out is not None:
        write_rows(out, found)
    if as_json:
        for row in found:
            typer.echo(json.dumps(row, sort_keys=True))


def _measure(
    console: Console, size: str, densities: str, workload: str, repeats: int, threads: int
) -> list[dict[str, Any]]:
    from thinwire.bench.codec import run_codecs
    from thinwire.bench.measure import parse_size
    from thinwire.bench.workloads import WORKLOADS
    from thinwire.errors import MisuseError

    if workload not in WORKLOADS:
        raise MisuseError(f"workload must be {' or '.join(WORKLOADS)}, not {workload!r}")
    try:
        shares = [float(word) for word in densities.split(",")]
    except ValueError:
        raise MisuseError(f"not densities: {densities!r}; write them as 0.002,0.01") from None
    found: list[dict[str, Any]] = []
    for share in shares:
        with console.status(f"{share:.2%}: making the weights") as status:
            pair = WORKLOADS[workload](parse_size(size), share, 0)
            found += run_codecs(
                pair, repeats=repeats, threads=threads, peers=True,
                report=lambda text, share=share: status.update(f"{share:.2%}: {text}"),  # type: ignore[misc]
            )  # fmt: skip
    return found

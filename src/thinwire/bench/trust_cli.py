"""The command ``thinwire bench trust``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["trust", "trust_lines"]


def trust_lines(rows: list[dict[str, object]]) -> list[str]:
    """What the rows say, as the documentation has it."""
    sign = next(row for row in rows if row["what"] == "sign")
    seal = next(row for row in rows if row["what"] == "encrypt")
    micro = {name: 1e6 * float(str(sign[f"{name}_s"])) for name in ("sign", "verify", "parse")}
    share = 100 * float(str(sign["sign_s"])) / float(str(sign["publish_s"]))
    speed = {name: float(str(seal[f"{name}_gib_s"])) for name in ("plain_put", "sealed_put", "sealed_get")}
    return [
        f"signing a version takes {micro['sign']:.0f} µs, verifying it {micro['verify']:.0f} µs (reading a manifest "
        f"without that: {micro['parse']:.0f} µs); signing is {share:.2g} % of a publish of "
        f"{float(str(sign['elements'])) / 1e6:.0f} M weights",
        f"writing objects goes at {speed['sealed_put']:.2g} GiB a second of processor time encrypted and "
        f"{speed['plain_put']:.2g} GiB plain, reading encrypted ones at "
        f"{speed['sealed_get']:.2g} GiB (memory to memory)",
    ]


def trust(
    elements: Annotated[int, typer.Option(min=1000, help="Weights of the version that is published.")] = 25_000_000,
    size: Annotated[str, typer.Option(help="Size of the object that is encrypted.")] = "64MiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Signing and verifying beside a publish; encrypting objects beside leaving them plain."""
    from thinwire.bench.measure import parse_size, write_rows
    from thinwire.bench.trust import trust_rows

    rows = trust_rows(elements, object_bytes=parse_size(size))
    console = Console(stderr=as_json, soft_wrap=True)
    for line in trust_lines(rows):
        console.print(line)
    if out is not None:
        write_rows(out, rows)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

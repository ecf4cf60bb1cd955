"""``thinwire report``: a page about a chain that opens without a network."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from thinwire.cli.options import Json, StoreArgument, TrustOption, existing_store, trust_of
from thinwire.cli.output import Output, bytes_text, count_text, watched

__all__ = ["report"]


def report(
    ctx: typer.Context,
    store: StoreArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The page; report.html, or with --json none by default."),
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", "-n", min=1, help="Show the last N versions; all by default.")
    ] = None,
    trust: TrustOption = None,
    as_json: Json = False,
) -> None:
    """Draw a chain: bytes, density by layer, lineage, times, health, in one HTML file.

    Reads manifests, a listing and the tables of the patches, no streams. What is missing or damaged is shown as such,
    and with --trust what was not signed by those keys; whether objects have their digests is checked by thinwire
    verify.
    """
    output = Output(ctx, as_json=as_json)
    from thinwire.cli.report.facts import read_facts

    opened = existing_store(store)
    with output.bars() as bars:
        facts = read_facts(watched(opened, bars), last=last, trust=trust_of(trust))
    path = out if out is not None or as_json else Path("report.html")
    if path is not None:
        from thinwire.cli.report.page import write_page

        write_page(facts, path)
    document = asdict(facts)
    document["problems"] = [problem.to_json() for problem in facts.problems]
    for row, version in zip(document["versions"], facts.versions, strict=True):
        row |= {"total_bytes": version.total_bytes, "density": version.density}
    output.document({**document, "page": None if path is None else str(path)})
    totals = facts.totals
    saved = (
        "" if totals.saved is None or totals.saved <= 0 else f" ({100 * totals.saved:.1f} % less than full checkpoints)"
    )
    output.say(
        f"{facts.store}: {count_text(totals.versions)} versions, {bytes_text(totals.published_bytes)} published{saved}"
        f"; {len(facts.problems) or 'no'} problems seen"
    )
    if path is not None:
        output.say(f"wrote {path}")

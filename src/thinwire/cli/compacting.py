"""``thinwire compact``: skip deltas for those who are many versions behind."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.cli.options import Json, KeyOption, StoreArgument, Threads, TrustOption, existing_store, trust_of
from thinwire.cli.output import Output, bytes_text, count_text, watched

if TYPE_CHECKING:
    from thinwire.sync.compactor import CompactReport

__all__ = ["compact"]

RETRY_S = 30.0


def compact(
    ctx: typer.Context,
    store: StoreArgument,
    dense: Annotated[
        bool, typer.Option("--dense", help="From 2, 4, ... 64 versions before every version: larger, and shorter ways.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing, only tell what would be.")] = False,
    key: KeyOption = None,
    trust: TrustOption = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Write skip deltas: patches that lead over 2, 4, 8, ... versions at once.

    Who is many versions behind then fetches a few patches instead of one a version. They are made of the patches that
    are there, anywhere where the store can be read and objects be created in it. Being killed loses nothing: run it
    again, and what has been written is kept. Nobody ever needs a skip delta, so deleting all of them does no harm; nor
    need they be signed, for the state's digest decides.
    """
    output = Output(ctx, as_json=as_json)
    from thinwire.sync import compactor

    opened = existing_store(store)
    with output.bars() as bars:
        report = compactor.compact(
            watched(opened, bars), kind="dense" if dense else "ladder", dry_run=dry_run,
            retry_s=RETRY_S, threads=threads, progress=lambda done, total: bars("compact", done, total),
            key=list(key or ()), trust=trust_of(trust),
        )  # fmt: skip
    output.document({"store": opened.url, **asdict(report), "written_bytes": report.written_bytes})
    output.say(_text(report))
    if report.impossible:
        first = report.impossible[0]
        output.note(
            f"{count_text(len(report.impossible))} cannot be made, such as {first.base} to {first.version}: a patch on "
            "the way is gone, or tensors move there"
        )


def _text(report: CompactReport) -> str:
    made = count_text(len(report.written))
    if report.dry_run:
        return f"would write up to {made} skip deltas; {count_text(report.kept)} are there"
    text = f"wrote {made} skip deltas, {bytes_text(report.written_bytes)}; {count_text(report.kept)} were there"
    return text + (f"; {count_text(len(report.useless))} would save nothing" if report.useless else "")

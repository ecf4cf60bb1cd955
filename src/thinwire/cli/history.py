"""``thinwire log``, ``thinwire verify`` and ``thinwire gc``: what a store holds, whether it is whole, what may go."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from thinwire.cli.options import (
    Json,
    MaxAge,
    StoreArgument,
    Threads,
    TrustOption,
    existing_store,
    seconds_of,
    trust_of,
)
from thinwire.cli.output import Output, age_text, bytes_text, count_text, share_text, watched
from thinwire.cli.reading import kind_of, read_patch
from thinwire.errors import MisuseError

if TYPE_CHECKING:
    from thinwire.cli.health import Problem
    from thinwire.sync.trust import Trust
    from thinwire.wire.manifest import Manifest

__all__ = ["gc", "log", "verify"]

RETRY_S = 30.0


# --- log -----------------------------------------------------------------------------------------------------------


def log(
    ctx: typer.Context,
    store: StoreArgument,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Show this many versions, the newest first.")] = 20,
    trust: TrustOption = None,
    max_age: MaxAge = None,
    as_json: Json = False,
) -> None:
    """List the versions in a store, the newest first."""
    output = Output(ctx, as_json=as_json)
    from thinwire.sync.collector import read_collected
    from thinwire.sync.remote import Remote

    opened = existing_store(store)
    with output.bars() as bars:
        remote = Remote(watched(opened, bars), retry_s=RETRY_S, trust=trust_of(trust, max_age), in_parts=True)
        newest = remote.newest()
        if newest is None:
            raise MisuseError(f"{opened.url} holds no versions", store=opened.url)
        remote.manifests(range(max(newest.version - limit + 1, 1), newest.version))
        collected = read_collected(opened, retry_s=RETRY_S)
    shown = sorted(remote.chain.manifests.values(), key=lambda m: -m.version)[:limit]
    now_s = time.time()
    rows = [{**_row(m, now_s), "given_up": collected is not None and collected.gave_up(m.version)} for m in shown]
    output.document({"store": opened.url, "newest": newest.version, "versions": rows})
    table = Table()
    for column in ("version", "step", "kind", "bytes", "changed", "age", "state"):
        table.add_column(column, justify="left" if column in ("kind", "state") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["version"]),
            "" if row["step"] is None else str(row["step"]),
            row["kind"] + (f" in {row['parts']} parts" if row["parts"] else ""),
            "given up" if row["given_up"] else bytes_text(row["bytes"]),
            share_text(row["density"], 1),
            "" if row["age_s"] is None else age_text(row["age_s"]),
            row["state"][:12],
            style="dim" if row["given_up"] else None,
        )
    output.show(table)


def _row(manifest: Manifest, now_s: float) -> dict[str, Any]:
    facts = manifest.facts
    created_s = facts["created_ms"] / 1000 if "created_ms" in facts else None
    return {
        "version": manifest.version,
        "step": manifest.step,
        "kind": manifest.kind,
        "parts": len(manifest.parts) or None,
        "bytes": sum(ref.size for ref in manifest.objects()),
        "changed": facts.get("changed"),
        "elements": facts.get("elements"),
        "density": facts.get("changed", 0) / max(facts.get("elements", 0), 1),
        "created_s": created_s,
        "age_s": None if created_s is None else now_s - created_s,
        "state": manifest.state,
        "metadata": dict(manifest.metadata),
    }


# --- verify --------------------------------------------------------------------------------------------------------


def verify(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(metavar="STORE|PATCH", show_default=False, help="A store, or a patch file.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Of a store: replay every version, compare all digests.")
    ] = False,
    trust: TrustOption = None,
    max_age: MaxAge = None,
    base: Annotated[
        Path | None, typer.Option(help="Of a patch: the checkpoint that it starts from; then all is checked.")
    ] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Check that a store or a patch is whole; list everything that is not.

    A store: every manifest is read and links to the one before, every object that a version needs is there with the
    size and digest that its manifest names, every skip delta fits the versions between which it leads. With --trust
    every version is signed by those keys, or the past of one that is. The exit code is 0 only if all is well; 5 if
    objects are missing or damaged; 3 if something contradicts what was published.
    """
    output = Output(ctx, as_json=as_json)
    kind = kind_of(what)
    if kind == "checkpoint":
        raise MisuseError(f"{what} is a checkpoint; its digest is shown by: thinwire inspect --digest {what}")
    if kind == "patch":
        if deep:
            raise MisuseError("--deep is for stores; a patch is checked in full with --base")
        _verify_patch(output, Path(what), base, threads)
        return
    if base is not None:
        raise MisuseError("--base is for patches; a store is checked in full with --deep")
    _verify_store(output, what, deep, threads, trust_of(trust, max_age))


def _verify_store(output: Output, url: str, deep: bool, threads: int, trust: Trust | None) -> None:
    from thinwire.cli.health import check_chain, check_objects, read_chain, replay
    from thinwire.cli.health_signed import check_signed, check_skips, replay_skips
    from thinwire.sync.collector import expected_objects

    store = existing_store(url)
    with output.bars() as bars:
        chain = read_chain(store)
        problems: list[Problem] = [*chain.problems, *check_chain(chain.manifests)]
        found, objects, size = check_objects(store, chain, stages=bars)
        problems += found
        if trust is not None:
            problems += check_signed(store, chain, trust)
        skips = check_skips(store, chain, trust)
        problems += skips.problems
        if deep:
            problems += replay(
                store, chain, threads=threads, stages=bars,
                beside=lambda remote, held: replay_skips(remote, held, skips.found, threads=threads),
            )  # fmt: skip
    kept = sorted(expected_objects(chain.manifests, chain.collected)[0])
    output.document(
        {
            "store": store.url, "ok": not problems, "versions": len(chain.manifests), "kept": kept,
            "skips": len(skips.found), "objects": objects + skips.objects, "bytes": size + skips.size,
            "signed": trust is not None, "replayed": len(kept) if deep else 0,
            "problems": [problem.to_json() for problem in problems],
        }
    )  # fmt: skip
    given_up = len(chain.manifests) - len(kept)
    output.say(
        f"{store.url}: {len(chain.manifests)} versions"
        + (f" ({given_up} given up by gc)" if given_up else "")
        + (f", {len(skips.found)} skip deltas" if skips.found else "")
        + f", {objects + skips.objects} objects, {bytes_text(size + skips.size)}"
        + (f"; {len(kept)} versions replayed" if deep else "")
    )
    for problem in problems:
        output.say(f"{problem.where}: {problem.message}")
    output.say(f"{len(problems)} problems" if problems else "all is well")
    codes = {problem.exit_code for problem in problems}
    if codes:
        raise typer.Exit(next((code for code in (3, 5) if code in codes), max(codes)))


def _verify_patch(output: Output, path: Path, base: Path | None, threads: int) -> None:
    from thinwire.sync.checkpoint import open_checkpoint
    from thinwire.wire.segment import decode_segment
    from thinwire.wire.spec import CODEC_CONTEXT, dtype_of

    decoded = 0
    with output.bars() as bars:
        patch = read_patch(path)
        if base is not None:
            from thinwire.sync.apply import apply_patch
            from thinwire.sync.files import stage_of

            source = open_checkpoint(base).map()
            apply_patch(
                patch, source.layouts, source.cells,
                aliases=source.aliases, threads=threads, progress=stage_of(bars, "apply"),
            )  # fmt: skip
            decoded = sum(1 for row in patch.segment_rows if row.changed)
        else:
            for row, data in zip(patch.segment_rows, patch.segments, strict=True):
                if row.changed and data[0] != CODEC_CONTEXT:
                    decode_segment(
                        memoryview(data), dtype_of(row.dtype),
                        cells=row.cells, changed=row.changed, values=patch.values, base=(),
                    )  # fmt: skip
                    decoded += 1
    segments = sum(1 for row in patch.segment_rows if row.changed)
    output.document(
        {
            "patch": str(path), "ok": True, "segments": segments, "decoded": decoded, "proved": base is not None,
            "parent": patch.parent, "result": patch.result,
        }
    )  # fmt: skip
    output.say(f"{path}: well-formed; {decoded} of {segments} segments decoded")
    if base is not None:
        output.say(f"it leads from {base} to state {patch.result}, proved")
    else:
        output.note("with --base CHECKPOINT everything is checked, up to the digest of the result")


# --- gc ------------------------------------------------------------------------------------------------------------


def gc(
    ctx: typer.Context,
    store: StoreArgument,
    keep_last: Annotated[int, typer.Option(min=1, metavar="N", help="Keep the last N versions.")] = 20,
    keep: Annotated[list[int] | None, typer.Option(metavar="V", help="Keep version V too; repeatable.")] = None,
    grace: Annotated[
        float, typer.Option(parser=seconds_of, metavar="TIME", help="Delete nothing younger, such as 30m or 2d.")
    ] = "1h",  # type: ignore[assignment]
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, only tell what would be.")] = False,
    trust: TrustOption = None,
    as_json: Json = False,
) -> None:
    """Delete the objects that no kept version needs.

    Kept versions stay reachable from nothing and from each other. Manifests are never deleted: they are small, and are
    the history. Run one collection at a time.
    """
    output = Output(ctx, as_json=as_json)
    from thinwire.sync.collector import collect

    opened = existing_store(store)
    with output.bars() as bars:
        report = collect(
            opened, keep_last=keep_last, keep=frozenset(keep or ()), grace_s=grace, dry_run=dry_run,
            now_s=time.time(), retry_s=RETRY_S, progress=lambda done, total: bars("delete", done, total),
            trust=trust_of(trust),
        )  # fmt: skip
    output.document({"store": opened.url, **asdict(report), "deleted_bytes": report.deleted_bytes})
    verb = "would delete" if dry_run else "deleted"
    output.say(f"{verb} {count_text(len(report.deleted))} objects, {bytes_text(report.deleted_bytes)}")
    output.say(
        f"kept {len(report.kept)} versions: {_ranges(report.kept)}; {count_text(report.kept_objects)} objects, "
        f"{bytes_text(report.kept_bytes)}"
    )
    if report.young_objects:
        output.say(
            f"left for later: {count_text(report.young_objects)} objects, {bytes_text(report.young_bytes)}, "
            f"younger than {age_text(grace)} or of no version yet"
        )
    if report.gone:
        output.warn(f"given up by an earlier gc, so not kept: {_ranges(report.gone)}")


def _ranges(versions: tuple[int, ...]) -> str:
    """Numbers in order, neighbours joined.

    >>> _ranges((1, 5, 6, 7, 9))
    '1, 5-7, 9'
    """
    runs: list[list[int]] = []
    for version in versions:
        if runs and version == runs[-1][1] + 1:
            runs[-1][1] = version
        else:
            runs.append([version, version])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

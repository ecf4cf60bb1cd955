"""``thinwire inspect``: what a patch, a checkpoint or a store holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from thinwire.cli.options import Hash, HashOption, Json, Threads, existing_store
from thinwire.cli.output import Output, bytes_text, count_text, share_text
from thinwire.cli.reading import kind_of, read_patch

if TYPE_CHECKING:
    from thinwire.wire.patch import Patch

__all__ = ["inspect"]


def inspect(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(metavar="PATCH|CHECKPOINT|STORE", show_default=False, help="What to look at.")],
    top: Annotated[int, typer.Option(min=0, help="Show this many tensors, those with most changes or bytes.")] = 20,
    digest: Annotated[bool, typer.Option("--digest", help="Of a checkpoint: hash it, which reads all of it.")] = False,
    hash_name: HashOption = Hash.blake3,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Show what a patch, a checkpoint or a store holds. Reads headers only, unless told otherwise."""
    output = Output(ctx, as_json=as_json)
    kind = kind_of(what)
    if kind == "patch":
        _inspect_patch(output, Path(what), top)
    elif kind == "checkpoint":
        _inspect_checkpoint(output, Path(what), top, hash_name.value if digest else None, threads)
    else:
        _inspect_store(output, what)


def _tensors(output: Output, title: str, columns: list[str], rows: list[list[str]], hidden: int) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", caption=f"and {hidden} more; see --top" if hidden > 0 else None)
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k < 3 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    output.show(table)


# --- a patch -------------------------------------------------------------------------------------------------------


def _segments_of(patch: Patch) -> list[dict[str, Any]]:
    """What can be told of the segments without decoding them: the codec, and for context coding its classes."""
    from thinwire.wire.spec import CODEC_CONTEXT, CODEC_NAMES

    found = []
    for row, data in zip(patch.segment_rows, patch.segments, strict=True):
        codec = data[0] if row.size else None
        found.append(
            {
                "dtype": row.dtype,
                "cells": row.cells,
                "changed": row.changed,
                "bytes": row.size,
                "codec": "none" if codec is None else CODEC_NAMES.get(codec, f"unknown ({codec})"),
                "classes": data[1] + 1 if codec == CODEC_CONTEXT and row.size > 1 else 1,
            }
        )
    return found


def _inspect_patch(output: Output, path: Path, top: int) -> None:
    patch = read_patch(path)
    size = path.stat().st_size
    segments = _segments_of(patch)
    rows = [
        {
            "name": row.name,
            "dtype": row.dtype,
            "shape": list(row.shape),
            "kind": row.kind,
            "source": row.source or None,
            "changed": row.changed if row.kind == "sparse" else row.cells if row.kind == "raw" else 0,
            "cells": row.cells,
        }
        for row in patch.rows
    ]
    each = size / patch.changed if patch.changed else None
    output.document(
        {
            "what": "patch", "path": str(path), "bytes": size, "changed": patch.changed, "cells": patch.cells,
            "bytes_per_changed": each, "level": patch.level, "values": patch.values, "hash": patch.hash,
            "parent": patch.parent, "result": patch.result, "tensors": rows, "removed": patch.removed,
            "aliases": patch.aliases, "segments": segments, "metadata": patch.metadata,
        }
    )  # fmt: skip
    kinds = Counter(row.kind for row in patch.rows)
    codecs = Counter(f"{s['codec']}" + (f" ({s['classes']} classes)" if s["classes"] > 1 else "") for s in segments)
    output.facts(
        {
            "patch": f"{bytes_text(size)}" + (f", {each:.2f} bytes a changed element" if each else ""),
            "changed": f"{count_text(patch.changed)} of {count_text(patch.cells)} elements "
            f"({share_text(patch.changed, patch.cells)})",
            "tensors": ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
            + f", {len(patch.removed)} removed",
            "coding": f"level {patch.level}, values {patch.values}; segments: "
            + (", ".join(f"{n} {codec}" for codec, n in sorted(codecs.items())) or "none"),
            "hash": patch.hash,
            "from": patch.parent,
            "to": patch.result,
        },
    )
    shown = sorted(patch.rows, key=lambda r: (r.kind == "moved", -(r.changed or r.cells * (r.kind == "raw")), r.name))
    _tensors(
        output,
        "tensors",
        ["name", "dtype", "shape", "kind", "changed", "density"],
        [
            [
                row.name, row.dtype, _shape(row.shape), row.kind + (f" from {row.source}" if row.source else ""),
                count_text(row.changed) if row.kind == "sparse" else "all",
                share_text(row.changed, row.cells) if row.kind == "sparse" else "",
            ]
            for row in shown[:top]
        ],
        len(shown) - top,
    )  # fmt: skip


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "()"


# --- a checkpoint --------------------------------------------------------------------------------------------------


def _inspect_checkpoint(output: Output, path: Path, top: int, hash_name: str | None, threads: int) -> None:
    from thinwire.sync.checkpoint import open_checkpoint, tree_of_checkpoint

    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    state = None
    if hash_name is not None:
        with output.bars() as bars:
            state = tree_of_checkpoint(checkpoint, hash_name=hash_name, threads=threads, stages=bars)
    metadata = checkpoint.files[0].header.metadata
    by_dtype = Counter[str]()
    for entry in tensors.values():
        by_dtype[entry.dtype] += entry.stop - entry.start
    digests = {} if state is None else {name: info.digest for name, info in state.tensors.items()}
    output.document(
        {
            "what": "checkpoint", "path": str(path), "bytes": checkpoint.size,
            "files": [{"name": f.path.name, "bytes": f.header.file_bytes} for f in checkpoint.files],
            "tensors": [
                {
                    "name": name, "dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.stop - entry.start,
                    "digest": digests.get(name),
                }
                for name, entry in tensors.items()
            ],
            "aliases": checkpoint.aliases, "metadata": metadata, "state": state and state.digest, "hash": hash_name,
        }
    )  # fmt: skip
    facts = {
        "checkpoint": f"{bytes_text(checkpoint.size)} in {len(tensors)} tensors and {len(checkpoint.files)} files",
        "dtypes": ", ".join(f"{name} {bytes_text(size)}" for name, size in by_dtype.most_common()),
    }
    if checkpoint.aliases:
        facts["tied"] = ", ".join(f"{alias} = {name}" for alias, name in sorted(checkpoint.aliases.items()))
    if metadata:
        facts["metadata"] = ", ".join(f"{key}={value[:80]}" for key, value in sorted(metadata.items()))
    if state is not None:
        facts["state"] = state.digest
    output.facts(facts)
    shown = sorted(tensors.items(), key=lambda item: (item[1].start - item[1].stop, item[0]))
    rows = [[n, e.dtype, _shape(e.shape), bytes_text(e.stop - e.start)] for n, e in shown[:top]]
    _tensors(output, "tensors", ["name", "dtype", "shape", "size"], rows, len(shown) - top)


# --- a store -------------------------------------------------------------------------------------------------------


def _inspect_store(output: Output, url: str) -> None:
    from thinwire.cli.health import check_chain, read_chain
    from thinwire.sync.collector import expected_objects

    store = existing_store(url)
    with output.bars():
        chain = read_chain(store)
        problems = [*chain.problems, *check_chain(chain.manifests)]
        sizes = {info.key: info.size for info in store.list("objects/")}
    kept, needed = expected_objects(chain.manifests, chain.collected)
    missing = sorted(key for key in needed if key not in sizes)
    newest = chain.manifests[max(chain.manifests)]
    whole = {v: m.every_anchor() for v, m in sorted(chain.manifests.items())}
    anchors = [version for version, refs in whole.items() if refs and all(ref.key in needed for ref in refs)]
    deltas = sum(delta.object.size for v in kept for delta in chain.manifests[v].every_delta())
    output.document(
        {
            "what": "store", "url": store.url, "versions": len(chain.manifests), "newest": newest.version,
            "step": newest.step, "state": newest.state, "hash": newest.hash, "kept": sorted(kept), "anchors": anchors,
            "state_bytes": newest.facts.get("state_bytes"), "delta_bytes": deltas, "parts": len(newest.parts) or None,
            "objects": len(sizes), "object_bytes": sum(sizes.values()), "needed_objects": len(needed),
            "missing": missing, "problems": [p.to_json() for p in problems],
        }
    )  # fmt: skip
    health = "links are whole, every object is there" if not (problems or missing) else "see below"
    given_up = len(chain.manifests) - len(kept)
    output.facts(
        {
            "store": store.url,
            "versions": f"{len(chain.manifests)}, the newest is {newest.version}"
            + (f" (step {newest.step})" if newest.step is not None else "")
            + (f"; {given_up} given up by gc" if given_up else ""),
            "state": f"{newest.state} ({bytes_text(newest.facts.get('state_bytes', 0))})"
            + (f" in {len(newest.parts)} parts, by a sharded trainer" if newest.parts else ""),
            "anchors": f"{len(anchors)}: "
            + ("..., " if len(anchors) > 10 else "")
            + ", ".join(map(str, anchors[-10:])),
            "deltas": bytes_text(deltas),
            "objects": f"{len(sizes)}, {bytes_text(sum(sizes.values()))}",
            "health": health,
        },
    )
    for problem in problems:
        output.warn(f"{problem.where}: {problem.message}")
    if missing:
        output.warn(f"{len(missing)} objects are missing, such as {missing[0]}")

"""``thinwire diff`` and ``thinwire apply``: patches between checkpoints on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from thinwire.cli.options import Hash, HashOption, Json, Level, LevelOption, Threads, Values, ValuesOption
from thinwire.cli.output import Output, bytes_text, count_text, share_text
from thinwire.cli.reading import read_patch

__all__ = ["apply", "diff"]

CHECKPOINT = "A safetensors file, or a Hugging Face folder."


def diff(
    ctx: typer.Context,
    base: Annotated[Path, typer.Argument(help=CHECKPOINT, show_default=False)],
    new: Annotated[Path, typer.Argument(help="The checkpoint that the patch shall lead to.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The patch to write.", show_default=False)],
    level: LevelOption = Level.small,
    values: ValuesOption = Values.ulp,
    hash_name: HashOption = Hash.blake3,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Write the patch that leads from one checkpoint to another, bit for bit.

    BASE and NEW may be laid out differently (a file and shards): tensors are matched by name.
    """
    output = Output(ctx, as_json=as_json)
    from thinwire.sync.checkpoint import diff_checkpoints, open_checkpoint
    from thinwire.sync.encode import Options
    from thinwire.sync.files import check_target, write_file

    check_target(out)
    began = time.perf_counter()
    options = Options(level.value, values.value, threads)
    with output.bars() as bars:
        old = open_checkpoint(base)
        patch = diff_checkpoints(old, open_checkpoint(new), options, hash_name=hash_name.value, stages=bars)
        buffers = patch.encode()
        write_file(out, buffers, stages=bars)
    size, seconds = sum(len(b) for b in buffers), time.perf_counter() - began
    each = size / patch.changed if patch.changed else None
    output.document(
        {
            "patch": str(out),
            "bytes": size,
            "base_bytes": old.size,
            "changed": patch.changed,
            "cells": patch.cells,
            "bytes_per_changed": each,
            "level": patch.level,
            "values": patch.values,
            "hash": patch.hash,
            "parent": patch.parent,
            "result": patch.result,
            "seconds": seconds,
        }
    )
    output.say(f"{out}: {bytes_text(size)}, {share_text(size, old.size)} of the base; {seconds:.1f} s")
    output.say(
        f"{count_text(patch.changed)} of {count_text(patch.cells)} elements changed "
        f"({share_text(patch.changed, patch.cells)}" + (f"; {each:.2f} bytes each)" if each else ")")
    )
    output.say(f"from {patch.parent}\nto   {patch.result}")


def apply(
    ctx: typer.Context,
    base: Annotated[Path, typer.Argument(help=CHECKPOINT, show_default=False)],
    patch: Annotated[Path, typer.Argument(help="A patch that starts from BASE.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The checkpoint to write; may be BASE itself.", show_default=False)
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Write the checkpoint that a patch leads to, proved by its digest.

    The result appears whole or not at all. It is laid out as BASE is; a folder's configuration and tokenizer are
    copied.
    """
    output = Output(ctx, as_json=as_json)
    from thinwire.sync.checkpoint import open_checkpoint
    from thinwire.sync.rewrite import patch_checkpoint

    began = time.perf_counter()
    with output.bars() as bars:
        parsed = read_patch(patch)
        written = patch_checkpoint(
            open_checkpoint(base), [parsed], out, overwrite=overwrite, threads=threads, stages=bars
        )
    seconds = time.perf_counter() - began
    output.document(
        {
            "checkpoint": str(out),
            "bytes": written.size,
            "changed": written.report.changed,
            "state": written.report.tree.digest,
            "left_out": written.left_out,
            "seconds": seconds,
        }
    )
    output.say(
        f"{out}: {bytes_text(written.size)}, {count_text(written.report.changed)} elements changed, proved; "
        f"{seconds:.1f} s"
    )
    output.say(f"state {written.report.tree.digest}")
    if written.left_out:
        output.note(f"not copied, since a patch does not bring them up to date: {', '.join(written.left_out)}")

"""``thinwire merge``: merging fine-tunes of one base, making patches of them, and how their changes meet."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.cli.options import Json, Level, LevelOption, Threads, examples
from thinwire.cli.output import Output, bytes_text, count_text, share_text
from thinwire.cli.patching import diff
from thinwire.cli.reading import read_patch
from thinwire.errors import MisuseError

if TYPE_CHECKING:
    from thinwire.merge.combine import Counts
    from thinwire.sync.checkpoint import Checkpoint
    from thinwire.wire.patch import Patch

__all__ = ["app"]

_EXAMPLES = examples(
    "thinwire merge --config merge.yaml -o ./merged",
    "thinwire merge --config merge.yaml -o merged.patch",
    "thinwire merge from-lora ./base ./adapter -o math.patch",
    "thinwire merge overlap --base ./base math.patch code.patch --figure overlap.png",
)
_COMMANDS = {"context_settings": {"help_option_names": ["-h", "--help"]}}
app = typer.Typer(invoke_without_command=True, add_completion=False, rich_markup_mode="rich", **_COMMANDS)  # type: ignore[arg-type]
_SHADES = " ░▒▓█"


@app.callback(epilog=_EXAMPLES)
def merge(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML as mergekit reads it.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A checkpoint, or NAME.patch.")] = None,
    level: LevelOption = Level.small,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Merge fine-tunes of one base: patches, checkpoints or LoRA adapters.

    Time and memory follow what was changed. The result is a checkpoint laid out as the base is, or one patch.
    """
    if ctx.invoked_subcommand is not None:
        return
    if config is None or out is None:
        print(ctx.get_help())
        raise typer.Exit(2)
    output = Output(ctx, as_json=as_json)
    from thinwire.cli.merge_config import config_of
    from thinwire.integrations.merging import merge_to_patch
    from thinwire.lab.yaml_files import read_mapping
    from thinwire.merge.recipe import layers_of
    from thinwire.sync.checkpoint import open_checkpoint
    from thinwire.sync.encode import Options
    from thinwire.sync.files import check_target, write_file
    from thinwire.sync.rewrite import patch_checkpoint
    from thinwire.wire.patch import Patch

    began = time.perf_counter()
    plan = config_of(read_mapping(config), config.absolute().parent)
    check_target(out)
    as_patch = out.suffix == ".patch"
    with output.bars() as bars:
        base = open_checkpoint(plan.base)
        patches = [_patch_of(base, path, threads) for path in plan.models]
        recipe = plan.recipe(layers_of(base.tensors))
        options = Options(level.value if as_patch else "fast", threads=threads)
        merged = merge_to_patch(base, patches, recipe, options=options, stages=bars)
        buffers = merged.encode()
        size = sum(len(b) for b in buffers)
        if as_patch:
            write_file(out, buffers, stages=bars)
        else:
            parsed = Patch.parse(b"".join(buffers))
            size = patch_checkpoint(base, [parsed], out, overwrite=overwrite, threads=threads, stages=bars).size
    seconds = time.perf_counter() - began
    facts = {
        "out": str(out), "method": plan.method, "models": [str(path) for path in plan.models], "bytes": size,
        "changed": merged.changed, "cells": merged.cells, "parent": merged.parent, "state": merged.result,
        "seconds": seconds,
    }  # fmt: skip
    output.document(facts)
    output.say(f"{out}: {plan.method} of {len(patches)}, {bytes_text(size)}; {seconds:.1f} s")
    output.say(
        f"{count_text(merged.changed)} of {count_text(merged.cells)} elements changed "
        f"({share_text(merged.changed, merged.cells)})\nstate {merged.result}"
    )


def _patch_of(base: Checkpoint, path: Path, threads: int) -> Patch:
    """A patch as it is; a checkpoint or an adapter converted into one."""
    from thinwire.integrations.lora import patch_from_lora
    from thinwire.sync.checkpoint import diff_checkpoints, open_checkpoint, read_header
    from thinwire.sync.encode import Options
    from thinwire.wire.patch import Patch
    from thinwire.wire.spec import FORMAT_PATCH

    options = Options("fast", threads=threads)
    if (path / "adapter_config.json").is_file():
        made = patch_from_lora(base, path, options=options)
    elif path.is_file() and read_header(path).metadata.get("format") == FORMAT_PATCH:
        return read_patch(path)
    else:
        made = diff_checkpoints(base, open_checkpoint(path), options)
    return Patch.parse(b"".join(made.encode()))


@app.command("from-lora")
def from_lora(
    ctx: typer.Context,
    base: Annotated[Path, typer.Argument(help="The checkpoint that the adapter was trained on.", show_default=False)],
    adapter: Annotated[Path, typer.Argument(help="A PEFT adapter's folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The patch to write.", show_default=False)],
    level: LevelOption = Level.small,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Write the patch from a base to the base with a LoRA adapter merged in."""
    output = Output(ctx, as_json=as_json)
    from thinwire.integrations.lora import patch_from_lora
    from thinwire.sync.encode import Options
    from thinwire.sync.files import check_target, write_file

    check_target(out)
    with output.bars() as bars:
        patch = patch_from_lora(base, adapter, options=Options(level.value, threads=threads), stages=bars)
        buffers = patch.encode()
        write_file(out, buffers, stages=bars)
    size = sum(len(b) for b in buffers)
    output.document({"patch": str(out), "bytes": size, "changed": patch.changed, "parent": patch.parent,
                     "result": patch.result})  # fmt: skip
    output.say(f"{out}: {bytes_text(size)}, {count_text(patch.changed)} of {count_text(patch.cells)} elements changed")
    output.say(f"from {patch.parent}\nto   {patch.result}")


app.command("from-checkpoint")(diff)


@app.command()
def overlap(
    ctx: typer.Context,
    patches: Annotated[list[Path], typer.Argument(help="Patches that start from one base.", show_default=False)],
    base: Annotated[Path, typer.Option("--base", help="The checkpoint they start from.", show_default=False)],
    figure: Annotated[Path | None, typer.Option(help="Draw heat maps here: .png, .pdf or .svg.")] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Show which weights fine-tunes share, which are their own, and where their signs conflict, layer by layer."""
    output = Output(ctx, as_json=as_json)
    from thinwire.integrations.merging import open_readers
    from thinwire.integrations.merging import overlap as count
    from thinwire.sync.checkpoint import open_checkpoint

    if len(patches) < 2:
        raise MisuseError("give two patches or more")
    with output.bars():
        readers = open_readers(open_checkpoint(base), [read_patch(path) for path in patches], threads=threads)
        found = list(count(readers))
        rows = _by_layer(found)
    names = [path.stem for path in patches]
    if figure is not None:
        from thinwire.merge.figure import overlap_figure

        overlap_figure(found, names, figure)
    output.document({"patches": [str(p) for p in patches], "layers": rows})
    if not as_json:
        _show(output, rows, names)


def _by_layer(found: object) -> list[dict[str, object]]:
    import numpy as np

    from thinwire.merge.recipe import layer_of

    rows: dict[str, list[tuple[int, Counts]]] = {}
    for name, cells, counts in found:  # type: ignore[attr-defined]
        layer = layer_of(name)
        rows.setdefault("others" if layer is None else f"layer {layer}", []).append((cells, counts))
    total = [one for members in rows.values() for one in members]
    result: list[dict[str, object]] = []
    for label, members in [*sorted(rows.items(), key=_by_number), ("all", total)]:
        if members:
            counts = [c for _, c in members]
            result.append({
                "layer": label,
                "cells": sum(cells for cells, _ in members),
                "union": sum(c.union for c in counts),
                "conflicting": sum(c.conflicting for c in counts),
                "shared": np.sum([c.shared for c in counts], axis=0).tolist(),
                "unique": np.sum([c.unique for c in counts], axis=0).tolist(),
                "pairs": np.sum([c.pairs for c in counts], axis=0).tolist(),
                "conflicts": np.sum([c.conflicts for c in counts], axis=0).tolist(),
            })  # fmt: skip
    return result


def _by_number(item: tuple[str, object]) -> tuple[int, str]:
    last = item[0].rpartition(" ")[2]
    return (int(last) if last.isdigit() else 1 << 30, item[0])


def _show(output: Output, rows: list[dict[str, object]], names: list[str]) -> None:
    from rich.table import Table

    table = Table("", "changed by any", "by several", "sign conflicts", "of it", *(f"{name} alone" for name in names))
    for row in rows:
        cells, union, shared = int(row["cells"]), int(row["union"]), row["shared"]  # type: ignore[call-overload]
        several = union - sum(row["unique"])  # type: ignore[call-overload]
        clash = int(row["conflicting"])  # type: ignore[call-overload]
        shade = _SHADES[min(4, round(8 * clash / several))] * 4 if several else ""
        own = [share_text(u, u + s) for u, s in zip(row["unique"], shared, strict=True)]  # type: ignore[call-overload]
        table.add_row(
            str(row["layer"]), share_text(union, cells), share_text(several, union), share_text(clash, several),
            shade, *own,
        )  # fmt: skip
    output.show(table)
    total = rows[-1] if rows else {"pairs": []}
    heat = Table("changed by both", *names)
    for i, name in enumerate(names):
        line = []
        for j in range(len(names)):
            union = _union(total, i, j)
            both = int(total["pairs"][i][j]) if i != j else union  # type: ignore[index]
            line.append(f"{_SHADES[min(4, round(4 * both / union)) if union else 0]} {share_text(both, union)}")
        heat.add_row(name, *line)
    output.show(heat)


def _union(row: dict[str, object], i: int, j: int) -> int:
    sizes = [a + b for a, b in zip(row["shared"], row["unique"], strict=True)]  # type: ignore[call-overload]
    return int(sizes[i] if i == j else sizes[i] + sizes[j] - row["pairs"][i][j])  # type: ignore[index]

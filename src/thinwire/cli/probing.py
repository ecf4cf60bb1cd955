"""``thinwire probe``: the instruments on checkpoints: what changed, where, in how many directions, and how much of it
is rounding alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.cli.options import Json, examples
from thinwire.cli.output import Output, count_text, share_text
from thinwire.errors import MisuseError

if TYPE_CHECKING:
    import torch

    from thinwire.integrations.probing import TensorChanges
    from thinwire.probe.changes import Changes

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
                  context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip

Old = Annotated[Path, typer.Argument(help="The earlier checkpoint.", show_default=False)]
New = Annotated[Path, typer.Argument(help="The later one.", show_default=False)]
Figure = Annotated[Path | None, typer.Option(help="Draw it here: .png, .pdf or .svg.")]
View = Annotated[str | None, typer.Option("--dtype", help="Look at floats as bf16, fp16 or fp32.", show_default=False)]


@app.callback()
def _probe() -> None:
    """Measure which weights move, how far, and how much of that is rounding alone."""


def _view(name: str | None) -> torch.dtype | None:
    import torch

    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name is not None and name not in known:
        raise MisuseError(f"there is no dtype {name!r}; give one of {', '.join(known)}")
    return known[name] if name is not None else None


def _row(changes: Changes) -> dict[str, Any]:
    return {
        "elements": changes.elements, "changed": changes.above,
        "density": changes.density, "mean_abs": changes.mean_abs,
        "max_abs": changes.max_abs, "std": changes.std, "update_ratio": changes.update_ratio,
        "new_nan": changes.new_nan, "new_inf": changes.new_inf, "ulps": list(changes.ulps),
    }  # fmt: skip


@app.command(epilog=examples(
    "thinwire probe diff step-100.safetensors step-101.safetensors",
    "thinwire probe diff ./base ./tuned --dtype bf16 --figure changes.png",
    "thinwire probe diff ./base ./tuned --ulps 1 --tensors --json",
))  # fmt: skip
def diff(
    ctx: typer.Context,
    old: Old,
    new: New,
    threshold: Annotated[float, typer.Option(min=0, help="Count changes larger than this.")] = 0.0,
    relative: Annotated[float, typer.Option(min=0, help="Count changes larger than this share of the weight.")] = 0.0,
    ulps: Annotated[int, typer.Option(min=0, help="Count changes of more than so many ULPs.")] = 0,
    tensors: Annotated[bool, typer.Option("--tensors", help="Show every tensor, not layers and kinds.")] = False,
    dtype: View = None,
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Show what changed between two checkpoints: by layer, by kind (attention, MLP, norm, embedding), by size."""
    output = Output(ctx, as_json=as_json)
    from thinwire.integrations.probing import checkpoint_changes, sums_by
    from thinwire.probe.changes import Limits
    from thinwire.probe.kinds import KINDS

    with output.bars() as bars:
        found = checkpoint_changes(
            old, new, Limits(threshold, relative, ulps), view=_view(dtype),
            progress=lambda done, whole: bars("compare", done, whole),
        )  # fmt: skip
    if figure is not None:
        from thinwire.probe.figures import changes_figure

        ordered = sorted(found.tensors, key=lambda one: (one.place.layer, KINDS.index(one.place.kind)))
        grid = sums_by(ordered, lambda one: (".".join(map(str, one.place.layer)) or "outside", one.place.kind))
        changes_figure(
            grid, figure, title=f"changed elements, {share_text(found.total.above, found.total.elements)} of all"
        )
    lists = {"added": found.added, "removed": found.removed, "reshaped": found.reshaped}
    output.document({
        "old": str(old), "new": str(new), "total": _row(found.total),
        "kinds": {kind: _row(changes) for kind, changes in found.by_kind().items()},
        "layers": {layer: _row(changes) for layer, changes in found.by_layer().items()},
        "tensors": {one.name: _row(one.changes) | {"kind": one.place.kind} for one in found.tensors},
        **{name: list(names) for name, names in lists.items()},
    })  # fmt: skip
    if as_json:
        return
    if tensors:
        _table(output, "tensor", {one.name: one.changes for one in found.tensors})
    else:
        _table(output, "layer", found.by_layer())
        _table(output, "kind", found.by_kind())
    output.say(f"{count_text(found.total.above)} of {count_text(found.total.elements)} elements changed "
               f"({share_text(found.total.above, found.total.elements)})")  # fmt: skip
    for name, names in lists.items():
        if names:
            output.say(f"{name}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}")
    if found.total.new_nan or found.total.new_inf:
        output.warn(f"{found.total.new_nan} elements have become NaN, {found.total.new_inf} infinite")


def _table(output: Output, heading: str, rows: dict[str, Changes]) -> None:
    from rich.table import Table

    headings = ["elements", "changed", "of 1 ULP", "mean |Δ|", "max |Δ|", "‖Δ‖/‖w‖"]
    shown = slice(1, 3) if heading == "tensor" else slice(None)  # names are long
    table = Table(heading, *headings[shown])
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for name, c in rows.items():
        single = c.ulps[1] if len(c.ulps) > 1 else 0
        cells = [
            count_text(c.elements), share_text(c.density, 1), share_text(single, max(c.changed, 1)),
            f"{c.mean_abs:.2g}", f"{c.max_abs:.2g}", f"{c.update_ratio:.2g}",
        ]  # fmt: skip
        table.add_row(name, *cells[shown])
    output.show(table)


@app.command(epilog=examples(
    "thinwire probe rank ./base ./tuned",
    "thinwire probe rank ./base ./tuned --kind stable --json",
))  # fmt: skip
def rank(
    ctx: typer.Context,
    old: Old,
    new: New,
    kind: Annotated[str, typer.Option(help="entropy, participation, stable, threshold or numerical.")] = "entropy",
    as_json: Json = False,
) -> None:
    """Show in how many directions each matrix has moved: the effective rank of its update."""
    output = Output(ctx, as_json=as_json)
    from thinwire.integrations.probing import pairs_of
    from thinwire.probe.rank import KINDS, effective_rank

    if kind not in KINDS:
        raise MisuseError(f"there is no rank {kind!r}; use one of {', '.join(KINDS)}")
    rows = []
    with output.bars() as bars:
        matrices = [(n, a, b) for n, a, b in pairs_of(old, new) if b.dim() > 1 and b.is_floating_point()]
        done, whole = 0, sum(b.nbytes for _, _, b in matrices)
        for name, a, b in matrices:
            found = effective_rank(b.float() - a.float(), kind)
            rows.append({"tensor": name, "shape": list(b.shape), "rank": found, "full": min(b.shape[0], b[0].numel())})
            done += b.nbytes
            bars("rank", done, whole)
    output.document({"old": str(old), "new": str(new), "kind": kind, "tensors": rows})
    if not as_json:
        _ranks(output, rows, kind)


def _ranks(output: Output, rows: list[dict[str, Any]], kind: str) -> None:
    from rich.table import Table

    table = Table("tensor", "shape", f"{kind} rank", "of", "share")
    table.columns[0].overflow = "fold"
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        shape = " × ".join(map(str, row["shape"]))
        table.add_row(
            row["tensor"], shape, f"{row['rank']:.1f}", str(row["full"]), share_text(row["rank"], row["full"])
        )
    output.show(table)


@app.command(epilog=examples(
    "thinwire probe null ./base --lr 1e-6",
    "thinwire probe null ./masters --dtype bf16 --lr 1e-6 --optimizer adamw",
    "thinwire probe null step-0.safetensors --against step-1.safetensors --lr 1e-6",
))  # fmt: skip
def null(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="The weights before the step.", show_default=False)],
    lr: Annotated[float, typer.Option(min=0, help="Learning rate.", show_default=False)],
    optimizer: Annotated[str, typer.Option(help="adam, adamw, sgd or adafactor.")] = "adamw",
    masters: Annotated[bool, typer.Option("--masters", help="fp32 masters that are not in the file.")] = False,
    gradient_rms: Annotated[float | None, typer.Option(min=0, help="SGD: root mean square of the gradient.")] = None,
    against: Annotated[Path | None, typer.Option(help="The weights after it: shows the excess.")] = None,
    dtype: View = None,
    as_json: Json = False,
) -> None:
    """Predict the share of weights that one step on random gradients would change.

    What data type, learning rate, optimiser and the sizes of the weights make of any gradient; training has to explain
    only what is observed beyond it. With --dtype, the file holds the masters of weights that are served as that.
    """
    output = Output(ctx, as_json=as_json)
    from thinwire.integrations.probing import checkpoint_changes
    from thinwire.probe.null import predict_null
    from thinwire.sync.checkpoint import open_checkpoint, tensors_of

    weights = {n: t for n, t in tensors_of(open_checkpoint(checkpoint).map()).items() if t.is_floating_point()}
    view = _view(dtype)
    wider = view if view is not None and any(t.dtype != view for t in weights.values()) else None
    found = predict_null(
        weights, optimizer=optimizer, lr=lr, view=wider, masters=masters, gradient_rms=gradient_rms
    )  # fmt: skip
    seen = {} if against is None else {o.name: o for o in checkpoint_changes(checkpoint, against, view=view).tensors}
    rows = _by_kind(found.tensors, found.elements, seen)
    output.document({"checkpoint": str(checkpoint), "fraction": found.fraction, "error": found.error, "kinds": rows,
                     "tensors": found.tensors})  # fmt: skip
    if as_json:
        return
    from rich.table import Table

    table = Table("kind", "elements", "null", *(("observed", "excess") if seen else ()))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in rows.items():
        more = () if not seen else (share_text(row["observed"], 1), f"{100 * row['excess']:+.3g} %")
        table.add_row(name, count_text(row["elements"]), share_text(row["null"], 1), *more)
    output.show(table)


def _by_kind(
    tensors: dict[str, float], elements: dict[str, int], seen: dict[str, TensorChanges]
) -> dict[str, dict[str, Any]]:
    from thinwire.probe.kinds import KINDS, place_of

    sums: dict[str, list[float]] = {}
    for name, share in tensors.items():
        for kind in (place_of(name).kind, "all"):
            total = sums.setdefault(kind, [0, 0.0, 0])
            total[0] += elements[name]
            total[1] += share * elements[name]
            total[2] += seen[name].changes.above if name in seen else 0
    found = {}
    for kind in (*KINDS, "all"):
        if kind in sums:
            count, expected, changed = sums[kind]
            size = max(count, 1)
            found[kind] = {"elements": int(count), "null": expected / size}
            if seen:
                found[kind] |= {"observed": changed / size, "excess": (changed - expected) / size}
    return found


@app.command(epilog=examples(
    "thinwire probe spatial ./base ./tuned",
    "thinwire probe spatial ./base ./tuned --heads 16 --figure where.png",
))  # fmt: skip
def spatial(
    ctx: typer.Context,
    old: Old,
    new: New,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads that rows of q, k and v projections make.")] = None,
    permutations: Annotated[int, typer.Option(min=19, help="Random draws to compare with.")] = 199,
    dtype: View = None,
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Test whether changes lie in rows, columns or heads of their matrices, or anywhere.

    The dispersion is the variance of the counts over that of random places: 1 if they are random, more if they prefer
    some rows. Random are places among elements of the same exponent, since small weights change more often whatever is
    learnt. p is by permutation.
    """
    output = Output(ctx, as_json=as_json)
    from thinwire.integrations.probing import pairs_of
    from thinwire.probe.kinds import place_of
    from thinwire.probe.spatial import mask_words, structure_of

    view = _view(dtype)
    rows: list[dict[str, Any]] = []
    masks: dict[str, torch.Tensor] = {}
    with output.bars() as bars:
        matrices = [(n, a, b) for n, a, b in pairs_of(old, new) if b.dim() == 2 and b.is_floating_point()]
        done, whole = 0, sum(b.nbytes for _, _, b in matrices)
        for name, a, b in matrices:
            before, after = (t.to(view) if view is not None else t for t in (a, b))
            changed = _bits(before) != _bits(after)
            done += b.nbytes
            bars("look", done, whole)
            if not changed.any():
                continue
            split = heads if heads is not None and place_of(name).role in ("q", "k", "v") else None
            split = split if split is not None and b.shape[0] % split == 0 else None
            found = structure_of(mask_words(changed), before, heads=split, permutations=permutations)
            axes = {"rows": found.rows, "columns": found.columns} | ({"heads": found.heads} if found.heads else {})
            rows.append({"tensor": name, "shape": list(b.shape), "changed": found.changed / found.elements} | {
                axis: {"dispersion": one.within_exponent.dispersion, "p": one.within_exponent.p_value,
                       "dispersion_uniform": one.uniform.dispersion, "p_uniform": one.uniform.p_value}
                for axis, one in axes.items()
            })  # fmt: skip
            masks[name] = changed
    if figure is not None:
        from thinwire.probe.figures import spatial_figure

        ranked = sorted(rows, key=lambda row: -max(row["rows"]["dispersion"], row["columns"]["dispersion"]))
        spatial_figure([(row["tensor"], masks[row["tensor"]]) for row in ranked], figure)
    output.document({"old": str(old), "new": str(new), "tensors": rows})
    if not as_json:
        _places(output, rows)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def _places(output: Output, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    if not rows:
        output.say("no matrix has changed")
        return
    with_heads = any("heads" in row for row in rows)
    table = Table("tensor", "changed", *(("rows p", "columns p", "heads p") if with_heads else ("rows p", "columns p")))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        cells = [
            f"{row[a]['dispersion']:.2f} {row[a]['p']:.3f}" if a in row else "" for a in ("rows", "columns", "heads")
        ]
        table.add_row(row["tensor"], share_text(row["changed"], 1), *cells[: 2 + with_heads])
    output.show(table)
    output.say("dispersion (1: random) and p, against random places among weights of the same exponent")


@app.command(epilog=examples(
    "thinwire probe ntk ./model --texts answers.tsv",
    "thinwire probe ntk ./model --texts answers.tsv --against ./tuned --json",
))  # fmt: skip
def ntk(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model.", show_default=False)],
    texts: Annotated[Path, typer.Option(help="Prompt, tab, answer a line.", show_default=False)],
    against: Annotated[Path | None, typer.Option(help="A later version: shows how far the kernel drifted.")] = None,
    memory: Annotated[float, typer.Option(min=0.01, help="GB that derivatives may take.")] = 1.0,
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Compute the tangent kernel of a policy's log-probabilities on texts: its spectrum, effective rank and drift."""
    output = Output(ctx, as_json=as_json)
    from thinwire.lab.kernels import kernel_of_texts, read_texts
    from thinwire.probe.rank import effective_rank
    from thinwire.probe.spectrum import spectrum_of
    from thinwire.probe.tangent import drift

    pairs = read_texts(texts)
    limit = int(memory * 1e9)
    first = kernel_of_texts(model, pairs, memory_max=limit)
    kernels = {str(model): first}
    if against is not None:
        kernels[str(against)] = kernel_of_texts(against, pairs, memory_max=limit)
    facts: dict[str, Any] = {"texts": len(pairs), "models": {}}
    spectra = {}
    for name, kernel in kernels.items():
        spectra[name] = spectrum_of(kernel).values  # it is symmetric and has no negative eigenvalue
        ranks = {kind: effective_rank(kernel, kind) for kind in ("entropy", "participation", "stable")}
        facts["models"][name] = {"eigenvalues": spectra[name].tolist(), "trace": float(kernel.trace()), "ranks": ranks}
    if against is not None:
        facts["drift"] = drift(first, kernels[str(against)])
    if figure is not None:
        from thinwire.probe.figures import spectrum_figure

        spectrum_figure({name: values.numpy() for name, values in spectra.items()}, figure)
    output.document(facts)
    for name, one in facts["models"].items():
        listed = ", ".join(f"{kind} {rank:.1f}" for kind, rank in one["ranks"].items())
        output.say(f"{name}: trace {one['trace']:.4g}, largest eigenvalue {one['eigenvalues'][0]:.4g}; "
                   f"effective rank {listed}, of {len(pairs)}")  # fmt: skip
    if "drift" in facts:
        output.say(f"drift (1 - alignment): {facts['drift']:.4f}")

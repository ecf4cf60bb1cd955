"""Rows of the accuracy benchmark as tables and as a figure, and its command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["accuracy", "accuracy_figure", "accuracy_markdown", "accuracy_table"]

Row = dict[str, Any]
_COLOURS = {
    "dense": "#374151",
    "feedback": "#0f766e",
    "corrected": "#2a9fd8",
    "no feedback": "#9ca3af",
    "averaged residual": "#c0392b",
}


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    from thinwire.bench.accuracy import summarise

    def points(value: float | None, error: float | None) -> str:
        return "" if value is None else f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"

    return [
        [
            f"{100 * line['skew']:.0f} %", line["variant"],
            "" if line["density_warmup"] is None else f"{100 * line['density_warmup']:.0f} %", str(line["seeds"]),
            points(line["accuracy"], line["error"]), points(line["below_dense"], line["below_error"]),
            f"{100 * line['received_share']:.1f} %",
        ]
        for line in summarise(rows)
    ]  # fmt: skip


_HEADING = ("label skew", "variant", "density warm-up", "seeds", "accuracy %", "points below dense", "bytes received")


def accuracy_table(rows: Sequence[Row]) -> Table:
    """One line for each skew and variant, means over seeds with their standard errors."""
    table = Table(title=_title(rows), title_justify="left")
    for i, heading in enumerate(_HEADING):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for cells in _cells(rows):
        table.add_row(*cells)
    return table


def accuracy_markdown(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(_HEADING) + " |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in _cells(rows))])


def _title(rows: Sequence[Row]) -> str:
    row = rows[0]
    return (
        f"{row['model']}, {row['train']:,} training and {row['test']:,} test images of {row['classes']} classes, "
        f"{row['workers']} workers, density {100 * row['density']:g} %, {row['epochs']} epochs"
    )


def accuracy_figure(rows: Sequence[Row], path: Path) -> None:
    """Accuracy and residual over the epochs, a column of plots for each skew, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    skews = sorted({row["skew"] for row in rows})
    figure, axes = plt.subplots(2, len(skews), figsize=(5.2 * len(skews), 6.4), squeeze=False, sharex=True)
    for column, skew in enumerate(skews):
        top, bottom = axes[0][column], axes[1][column]
        for variant, colour in _COLOURS.items():
            found = [row for row in rows if row["variant"] == variant and row["skew"] == skew]
            if not found:
                continue
            epochs = range(1, found[0]["epochs"] + 1)
            curves = [[100 * value for value in row["accuracies"]] for row in found]
            middle = [mean(values) for values in zip(*curves, strict=True)]
            top.plot(epochs, middle, color=colour, label=variant, linewidth=2)
            lowest, highest = map(min, zip(*curves, strict=True)), map(max, zip(*curves, strict=True))
            top.fill_between(epochs, list(lowest), list(highest), color=colour, alpha=0.15, linewidth=0)
            norms = [mean(values) for values in zip(*(row["residual_norms"] for row in found), strict=True)]
            if any(norms):
                bottom.plot(epochs, norms, color=colour, label=variant, linewidth=2)
        top.set_title("iid shards" if skew == 0 else f"{100 * skew:.0f} % label skew")
        bottom.set_xlabel("epoch")
        bottom.set_yscale("log")
        for axis in (top, bottom):
            axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("test accuracy (%)")
    axes[1][0].set_ylabel("norm of worker 0's residual")
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=len(handles), fontsize=8, frameon=False)
    figure.suptitle(_title(rows) + ".\nLines: mean over seeds; bands: from worst to best seed.", fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def accuracy(
    data: Annotated[str, typer.Option(help="digits, mnist, cifar10 or hf:NAME.")] = "digits",
    model: Annotated[str, typer.Option(help="simple-cnn or resnet18.")] = "simple-cnn",
    variants: Annotated[str, typer.Option(help="Names with commas between, or all.")] = "all",
    skews: Annotated[str, typer.Option(help="Shares of samples of a worker's own classes.")] = "0,0.9",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    workers: Annotated[int, typer.Option(min=2, help="Workers, as threads of one process.")] = 4,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Images of a worker and step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.05,
    density: Annotated[float, typer.Option(help="Share of elements sent.")] = 0.01,
    density_warmup: Annotated[float, typer.Option(help="Share of steps in which it falls from 25 %.")] = 0.25,
    augment: Annotated[str, typer.Option(help="none, crop or crop-flip.")] = "none",
    train: Annotated[int | None, typer.Option(help="Training images used; default: all.")] = None,
    test: Annotated[int | None, typer.Option(help="Test images used; default: all.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print rows of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the curves into this PNG file.")] = None,
) -> None:
    """Accuracy under compression, dense beside it, with the two controls that must fail on skewed shards."""
    import torch

    from thinwire.bench.accuracy import VARIANTS, AccuracyOptions, matrix, run_accuracy
    from thinwire.bench.measure import write_rows
    from thinwire.lab.vision.data import load_images

    images = load_images(data).first(train, test).to(torch.device(device))
    base = AccuracyOptions(
        model=model, workers=workers, epochs=epochs, batch=batch, rate=rate, density=density,
        density_warmup=density_warmup, augment=augment, bfloat16=device == "cuda",
    )  # fmt: skip
    names = VARIANTS if variants == "all" else tuple(name.strip() for name in variants.split(","))
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=132)
    rows = []
    with console.status("training") as status:
        for options in matrix(base, names, [float(skew) for skew in skews.split(",")], seeds):
            rows.append(run_accuracy(options, images, report=status.update))
            if out is not None:
                write_rows(out, rows)
    console.print(accuracy_table(rows))
    if figure is not None:
        accuracy_figure(rows, figure)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row, sort_keys=True))

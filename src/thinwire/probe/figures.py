"""Pictures of what changed between two states: by layer and kind, and where in a matrix. Drawn by Matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinwire.errors import MisuseError
from thinwire.probe.changes import Changes, ulp_bin_label
from thinwire.probe.kinds import KINDS

__all__ = ["changes_figure", "figure_class", "save_figure", "spatial_figure", "spectrum_figure"]


def figure_class() -> Any:
    """Matplotlib's ``Figure``, which draws without a display.

    Raises:
        MisuseError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MisuseError("pictures need Matplotlib: pip install 'thinwire[probe]'") from error
    return Figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as its ending says (``.png``, ``.pdf``, ``.svg``).

    Raises:
        MisuseError: an ending that Matplotlib cannot write.
    """
    try:
        figure.savefig(Path(path), dpi=150)
    except ValueError as error:
        raise MisuseError(f"{path}: {error}", path=str(path)) from error


def changes_figure(
    grid: Mapping[tuple[str, str], Changes], path: str | os.PathLike[str], *, title: str = "changed elements"
) -> None:
    """Draw the share of changed elements by layer (rows) and kind (columns), and how many ULPs they moved.

    ``grid`` holds the changes by (layer, kind), in the order of rows.

    Raises:
        MisuseError: Matplotlib is not installed; nothing to draw.
    """
    if not grid:
        raise MisuseError("there is nothing to draw")
    rows, columns = (list(dict.fromkeys(key[i] for key in grid)) for i in (0, 1))
    columns.sort(key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS))
    shares = np.full((len(rows), len(columns)), np.nan)
    for (row, column), changes in grid.items():
        shares[rows.index(row), columns.index(column)] = 100 * changes.density
    figure = figure_class()(figsize=(9.5, 2.2 + 0.24 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    image = left.imshow(shares, cmap="viridis", vmin=0, aspect="auto")
    left.set_title(title, fontsize=10)
    left.set_facecolor("0.9")
    left.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    left.set_yticks(range(len(rows)), rows, fontsize=8)
    left.set_ylabel("layer", fontsize=9)
    for (i, j), share in np.ndenumerate(shares):
        if len(rows) <= 40 and not np.isnan(share):
            bright = share > 0.6 * np.nanmax(shares)
            left.text(j, i, f"{share:.2g}", ha="center", va="center", fontsize=7, color="black" if bright else "white")
    figure.colorbar(image, ax=left, label="% of the elements")
    _ulps(right, sum(grid.values(), Changes()))
    save_figure(figure, path)


def _ulps(axes: Any, total: Changes) -> None:
    counts = np.array(total.ulps[1:] or (0,), dtype=np.float64)
    axes.bar(range(len(counts)), 100 * counts / max(total.elements, 1), color="tab:blue")
    axes.set_xticks(
        range(len(counts)), [ulp_bin_label(k + 1) for k in range(len(counts))], rotation=45, ha="right", fontsize=8
    )
    axes.set_xlabel("distance in units in the last place (ULP)", fontsize=9)
    axes.set_ylabel("% of the elements", fontsize=9)
    axes.set_title("how far the changed ones moved", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _blocks(changed: torch.Tensor, side: int) -> np.ndarray[Any, Any]:
    """The share of changed elements in blocks, at most ``side`` of them each way."""
    rows, columns = changed.shape
    high, wide = -(-rows // side), -(-columns // side)
    pads = (0, -columns % wide, 0, -rows % high)
    sums, counts = (
        torch.nn.functional.pad(part, pads).view(-(-rows // high), high, -(-columns // wide), wide).sum((1, 3))
        for part in (changed.float(), torch.ones_like(changed, dtype=torch.float32))
    )
    found: np.ndarray[Any, Any] = (100 * sums / counts).numpy()
    return found


def spatial_figure(masks: Sequence[tuple[str, torch.Tensor]], path: str | os.PathLike[str], *, side: int = 128) -> None:
    """Draw where in matrices elements changed: the share in blocks, and along rows and columns.

    ``masks`` are names and boolean matrices [rows, columns]; at most eight are drawn, each in ``side`` blocks a side.

    Raises:
        MisuseError: Matplotlib is not installed; nothing to draw.
    """
    if not masks:
        raise MisuseError("there is nothing to draw: no matrix has changed")
    drawn = list(masks)[:8]
    wide = min(4, len(drawn))
    figure = figure_class()(figsize=(4.2 * wide, 4.0 * -(-len(drawn) // wide)), layout="constrained")
    for cell, (name, changed) in zip(
        figure.subfigures(-(-len(drawn) // wide), wide, squeeze=False).flat, drawn, strict=False
    ):
        _matrix(cell, name, changed, side)
    save_figure(figure, path)


def _matrix(figure: Any, name: str, changed: torch.Tensor, side: int) -> None:
    axes = figure.subplots(2, 2, width_ratios=[4, 1], height_ratios=[1, 4], squeeze=True)
    (top, corner), (middle, edge) = axes
    corner.axis("off")
    shares = _blocks(changed, side)
    rows, columns = changed.shape
    image = middle.imshow(shares, cmap="magma", vmin=0, aspect="auto", extent=(0, columns, rows, 0))
    middle.set_xlabel(f"column of {columns:,}", fontsize=8)
    middle.set_ylabel(f"row of {rows:,}", fontsize=8)
    figure.colorbar(image, ax=axes, label="changed, % of a block", shrink=0.7)
    top.plot(np.arange(shares.shape[1]) * columns / shares.shape[1], shares.mean(0), lw=0.8, color="black")
    edge.plot(shares.mean(1), np.arange(shares.shape[0]) * rows / shares.shape[0], lw=0.8, color="black")
    top.set_xlim(0, columns)
    edge.set_ylim(rows, 0)
    top.set_ylim(0)
    edge.set_xlim(0)
    top.set_xticks([])
    edge.set_yticks([])
    for axis in (top, edge, middle):
        axis.tick_params(labelsize=7)
    figure.suptitle(name if len(name) <= 48 else "…" + name[-47:], fontsize=8)


def spectrum_figure(spectra: Mapping[str, np.ndarray[Any, Any]], path: str | os.PathLike[str]) -> None:
    """Draw eigenvalues by their rank, both on logarithmic axes; one line for each name.

    Raises:
        MisuseError: Matplotlib is not installed.
    """
    figure = figure_class()(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, values in spectra.items():
        positive = values[values > 0]
        axes.plot(np.arange(1, len(positive) + 1), positive, marker="o", ms=3, lw=1.2, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rank of the eigenvalue", fontsize=9)
    axes.set_ylabel("eigenvalue of the tangent kernel", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)

"""A picture of how fine-tunes meet: what each tensor's changes share and where they conflict, by layer."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thinwire.errors import MisuseError
from thinwire.merge.combine import Counts
from thinwire.merge.recipe import layer_of

__all__ = ["overlap_figure"]

_COLUMNS_MAX = 24
_NUMBER = re.compile(r"(?:^|\.)\d{1,6}\.")


def overlap_figure(
    found: Sequence[tuple[str, int, Counts]], tasks: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draw heat maps to ``path`` (PNG, PDF or SVG by its ending).

    Left: of the cells that any task changes, the share that several change; middle: of those, the share whose signs
    conflict; both by layer (rows) and tensor (columns). Right: of the cells that either of two tasks changes, the share
    that both do (the Jaccard index), over the whole model. ``found`` is what
    :func:`thinwire.integrations.merging.overlap` gives, ``tasks`` are their names.

    Raises:
        MisuseError: Matplotlib is not installed, nothing was changed, or an ending that it cannot write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MisuseError("pictures need Matplotlib: pip install 'thinwire[merge]'") from error
    if not found:
        raise MisuseError("there is nothing to draw: the patches change no tensor of numbers")
    rows, columns, several, clashes = _grids(found)
    height = 1.9 + 0.26 * max(len(rows), len(tasks))
    figure = Figure(figsize=(5.2 + 2 * (0.8 + 0.3 * len(columns)), height), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[len(columns), len(columns), max(4, len(tasks))])
    _heat(figure, left, several, rows, columns, "changed by several\n(of what any task changes)", most=None)
    _heat(figure, middle, clashes, rows, columns, "signs conflict\n(of what several change)")
    both = _jaccard([counts for _, _, counts in found])
    _heat(figure, right, both, tasks, tasks, "changed by both\n(of what either changes)")
    for (i, j), share in np.ndenumerate(both):
        ink = "black" if share > 0.6 else "white"
        right.text(
            j,
            i,
            f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.1f}",
            ha="center",
            va="center",
            fontsize=7,
            color=ink,
        )
    try:
        figure.savefig(Path(path), dpi=150)
    except ValueError as error:
        raise MisuseError(f"{path}: {error}", path=str(path)) from error


def _grids(found: Sequence[tuple[str, int, Counts]]) -> tuple[list[str], list[str], Any, Any]:
    """Labels of rows and columns, and per cent shares [rows, columns]; NaN where there is no tensor or nothing."""
    sums: dict[tuple[int, str], list[int]] = {}
    for name, _, counts in found:
        layer = layer_of(name)
        kind = _NUMBER.split(name, maxsplit=1)[-1].removesuffix(".weight") if layer is not None else "outside"
        total = sums.setdefault((-1 if layer is None else layer, kind), [0, 0, 0])
        for i, more in enumerate((counts.union, counts.union - int(counts.unique.sum()), counts.conflicting)):
            total[i] += more
    kinds = list(dict.fromkeys(kind for _, kind in sorted(sums)))
    if len(kinds) > _COLUMNS_MAX:  # the rest would not be legible
        kinds = [*kinds[: _COLUMNS_MAX - 1], "other"]
        for layer, kind in [key for key in sums if key[1] not in kinds]:
            merged = sums.setdefault((layer, "other"), [0, 0, 0])
            merged[:] = [a + b for a, b in zip(merged, sums.pop((layer, kind)), strict=True)]
    layers = sorted({layer for layer, _ in sums})
    several, clashes = (np.full((len(layers), len(kinds)), np.nan) for _ in range(2))
    for (layer, kind), (union, shared, conflicting) in sums.items():
        at = layers.index(layer), kinds.index(kind)
        several[at] = shared / union if union else np.nan
        clashes[at] = conflicting / shared if shared else np.nan
    return ["outside layers" if layer < 0 else f"layer {layer}" for layer in layers], kinds, several, clashes


def _jaccard(counts: Sequence[Counts]) -> Any:
    own = np.sum([c.shared + c.unique for c in counts], axis=0)
    both = np.sum([c.pairs for c in counts], axis=0)
    np.fill_diagonal(both, own)
    return both / np.maximum(own[:, None] + own[None, :] - both, 1)


def _heat(
    figure: Any, axes: Any, grid: Any, rows: Sequence[str], columns: Sequence[str], title: str, most: float | None = 1
) -> None:
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_facecolor("0.9")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, format=lambda share, _: f"{100 * share:.0f} %")
    bar.ax.tick_params(labelsize=7)

"""The history of a tracker as a figure for a paper: what changed, what the null explains, where, and by how much."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinwire.errors import MisuseError
from thinwire.probe.changes import ulp_bin_label
from thinwire.probe.kinds import KINDS

__all__ = ["history_figure"]

Row = dict[str, Any]

_COLORS = dict(
    zip(KINDS, ("#0b6e4f", "#c0392b", "#2f6fd8", "#7d3c98", "#b9770e", "#16a085", "#6b7280", "#9ca3af"), strict=True)
)
_OBSERVED, _NULL = "#1f2937", "#d97706"


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MisuseError("figures need matplotlib: pip install 'thinwire[probe]'") from error
    return Figure(figsize=(11, 7.2), layout="constrained")


def _percent(rows: Sequence[Row], key: str) -> list[float]:
    return [float("nan") if row[key] is None else 100 * row[key] for row in rows]


def _changed(axis: Any, rows: Sequence[Row], lag: int) -> None:
    steps = [row["step"] for row in rows]
    axis.plot(steps, _percent(rows, "density"), color=_OBSERVED, linewidth=1.6, label="observed")
    if any(row["null"] is not None for row in rows):
        known = [row for row in rows if row["null"] is not None]
        null = _percent(known, "null")
        half = [(row.get("excess_high") or 0) - (row.get("excess") or 0) for row in known]
        low, high = ([n + sign * 100 * h for n, h in zip(null, half, strict=True)] for sign in (-1, 1))
        at = [row["step"] for row in known]
        axis.plot(at, null, color=_NULL, linewidth=1.4, linestyle="--", label="random gradients (null)")
        axis.fill_between(at, low, high, color=_NULL, alpha=0.25, linewidth=0, label="its 95 % interval")
    axis.set(title=f"Changed in {lag} step{'s' * (lag > 1)}", xlabel="step", ylabel="% of weights")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)


def _excess(axis: Any, rows: Sequence[Row]) -> None:
    known = [row for row in rows if row["null"] is not None]
    axis.set(title="Beyond the null", xlabel="step", ylabel="percentage points")
    if not known:
        axis.text(0.5, 0.5, "no null was measured", ha="center", va="center", transform=axis.transAxes, color="#6b7280")
        return
    steps = [row["step"] for row in known]
    axis.axhline(0, color="#9ca3af", linewidth=0.8)
    low, high = (_percent(known, key) for key in ("excess_low", "excess_high"))
    axis.fill_between(steps, low, high, color=_OBSERVED, alpha=0.18, linewidth=0, label="95 % interval")
    axis.plot(steps, _percent(known, "excess"), color=_OBSERVED, linewidth=1.6, label="observed - null")
    axis.legend(frameon=False, fontsize=8)


def _kinds(axis: Any, rows: Sequence[Row]) -> None:
    for kind in KINDS:
        own = [row for row in rows if row["name"] == kind]
        if own:
            axis.plot(
                [row["step"] for row in own], _percent(own, "density"), color=_COLORS[kind], label=kind, linewidth=1.4
            )
    axis.set(title="By kind of parameter", xlabel="step", ylabel="% of weights")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, ncols=2)


def _ulps(axis: Any, rows: Sequence[Row]) -> None:
    bins = max((len(row["ulps"] or ()) for row in rows), default=0)
    totals = [sum((row["ulps"] or [])[k] if k < len(row["ulps"] or []) else 0 for row in rows) for k in range(bins)]
    changed = sum(totals)
    axis.set(title="Size of the changes", xlabel="ULP (units in the last place)", ylabel="% of changes")
    if not changed:
        axis.text(0.5, 0.5, "sizes are not known", ha="center", va="center", transform=axis.transAxes, color="#6b7280")
        return
    first = next(k for k in range(bins) if totals[k])
    axis.bar(range(first, bins), [100 * total / changed for total in totals[first:]], color=_OBSERVED, width=0.8)
    axis.set_xticks(range(first, bins), [_short(k) for k in range(first, bins)], rotation=45, ha="right", fontsize=7)


def _short(index: int) -> str:
    label = ulp_bin_label(index)
    return label if index < 12 else f"≤ 2^{index - 1}"


def history_figure(rows: Sequence[Row], path: str | os.PathLike[str], *, lag: int | None = None) -> None:
    """Draw the rows of a history (:func:`thinwire.probe.history.load_history`) to a PNG, PDF or SVG file.

    Four panels: the per cent of weights that changed in each step, with the null and its interval; what is beyond the
    null; by kind of parameter; and the changes by ULP distance over all steps. ``lag``: by default the shortest.

    Raises:
        MisuseError: no rows of that lag; matplotlib is not installed.
    """
    lags = sorted({row["lag"] for row in rows})
    lag = lags[0] if lag is None and lags else lag
    own = [row for row in rows if row["lag"] == lag]
    whole, kinds = ([row for row in own if row["scope"] == scope] for scope in ("all", "kind"))
    if lag is None or not whole:
        raise MisuseError(f"there is nothing to draw: no rows of lag {lag}; there are {lags}", lags=lags)
    figure = _figure()
    (changed, excess), (by_kind, sizes) = figure.subplots(2, 2)
    _changed(changed, whole, lag)
    _excess(excess, whole)
    _kinds(by_kind, kinds)
    _ulps(sizes, whole)
    for axis in (changed, excess, by_kind, sizes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
        if axis is not sizes:
            axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(Path(path), dpi=160)

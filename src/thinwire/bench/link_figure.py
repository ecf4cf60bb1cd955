"""Two pictures of the same ways: bytes against work, and time over every link."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinwire.bench.link import FULL, Way, pays

__all__ = ["link_figure"]

Row = dict[str, Any]
_COLOURS = {
    "thinwire fast": "#7cc29f", "thinwire small": "#2a9d6e", "thinwire smallest": "#0b4f38", FULL: "#374151",
}  # fmt: skip
_GREY = "#9aa3ad"


def link_figure(rows: Sequence[Row], path: Path) -> None:
    """One workload's rows as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = [10 ** (7 + k / 20) for k in range(81)]
    ways = [Way(row["codec"], row["work_s"], row["bytes"]) for row in rows if not row["codec"].endswith("absolute")]
    others = [way.name for way in ways if way.name not in _COLOURS]
    for way in sorted(ways, key=lambda way: way.name in _COLOURS):
        colour, ours = _COLOURS.get(way.name, _GREY), way.name in _COLOURS
        left.plot(way.bytes / 1e6, way.work_s, "o" if ours else "s", color=colour, ms=8 if ours else 5)
        label = way.name if ours else "what others send" if way.name == others[0] else None
        right.plot(rates, [way.seconds(rate) for rate in rates], color=colour, lw=2 if ours else 0.8, label=label)
    _name(left, [(way.bytes / 1e6, way.work_s, way.name) for way in ways])
    for k, (rate, way) in enumerate(pays([w for w in ways if w.name in _COLOURS])):
        if k and rates[0] < rate < rates[-1]:
            right.axvline(rate, color=_COLOURS[way.name], lw=0.8, ls=":")
            right.text(
                rate, 0.985, f" {way.name}", rotation=90, va="top", ha="right", fontsize=8, color=_COLOURS[way.name],
                transform=right.get_xaxis_transform(),
            )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="bytes sent, MB", ylabel="seconds of work on both sides, with digests")
    left.set_xlim(0.6 * min(w.bytes for w in ways) / 1e6, 6 * max(w.bytes for w in ways) / 1e6)
    right.set(xscale="log", yscale="log", xlabel="link, bits a second", ylabel="seconds from publish to proved weights")
    right.set_xticks([1e7, 1e8, 1e9, 1e10, 1e11], ["10 M", "100 M", "1 G", "10 G", "100 G"])
    right.legend(fontsize=8, frameon=False, loc=(0.44, 0.72))
    for axis in (left, right):
        axis.grid(alpha=0.2)
        axis.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.xaxis.set_major_formatter("{x:g}")
    first = rows[0]
    left.set_title(
        f"{first['workload']}: {first['density']:.2%} of {first['state_bytes'] / 2**30:.3g} GiB changed", loc="left",
        fontsize=11,
    )  # fmt: skip
    right.set_title(
        "Measured work, computed links; dotted: from here on this level is the quickest", loc="left", fontsize=9
    )
    figure.savefig(path, dpi=130)


def _name(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside the points, moved up where they would cover each other."""
    taken: list[tuple[float, float]] = []
    room = 0.036 * math.log10(max(y for _, y, _ in points) / min(y for _, y, _ in points))
    for x, y, name in sorted(points, key=lambda p: (p[1], p[0])):
        at = math.log10(y)
        while any(abs(at - other) < room and abs(math.log10(x) - where) < 0.8 for where, other in taken):
            at += room / 4
        taken.append((math.log10(x), at))
        axis.annotate(
            name, (x, y), (x * 1.12, 10**at), textcoords="data", fontsize=8, va="center",
            color=_COLOURS.get(name, "#5b6570"), arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#cbd2d9"},
        )  # fmt: skip

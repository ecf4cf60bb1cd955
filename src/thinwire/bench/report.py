"""Rows of the benchmarks as tables and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.table import Table

__all__ = [
    "codec_figure",
    "codec_html",
    "codec_table",
    "follow_table",
    "real_figure",
    "real_html",
    "real_table",
    "stage_line",
]

Row = dict[str, Any]
_OURS, _THEIRS, _BOUND = "#0b6e4f", "#6b7280", "#c0392b"
_OFF_SCALE = 20.0  # bytes per changed element
_STAGES = (("encode", "old and new state to patch"), ("apply", "patch to new state"))


def _codecs(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["bench"] == "codec"]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _title(row: Row) -> str:
    size = row["state_bytes"] / (1 << 30)
    shown = f"{size:g} GiB" if size >= 1 else f"{size * 1024:g} MiB"
    return f"{row['workload']['name']}: {shown} of bf16, {100 * row['density']:.2f} % changed"


def codec_table(rows: Sequence[Row]) -> Table:
    """One line a codec. Speeds are GiB of state a second, best (median)."""
    first = _codecs(rows)[0]
    entropy = first["entropy"]
    table = Table(title=_title(first), title_justify="left", caption_justify="left")
    table.caption = (
        f"Entropy {entropy['plain']:.3f} B a change, given the exponents {entropy['exponent']:.3f}. Speeds in GiB of "
        f"state a second, best (median), {first['threads']} threads.\nthinwire computes digests both ways, the others "
        f"none: '+digest' adds the time of one.\nPlain copy {first['copy_s']:.3f} s, digest {first['digest_s']:.3f} s. "
        f"Load {first['load_before']} to {first['load_after']}."
    )
    table.add_column("codec")
    for heading in (
        "B/changed",
        "encode",
        "+digest",
        "apply",
        "+digest",
        "copies enc/apply",
        "extra memory % enc/apply",
    ):
        table.add_column(heading, justify="right")
    for row in _codecs(rows):
        cells = [row["codec"], _number(row["bytes_per_changed"], 3)]
        for stage, _ in _STAGES:
            t = row[stage]
            cells.append(f"{t['best_gib_s']:.2f} ({t['median_gib_s']:.2f})")
            cells.append(f"{t['best_gib_s_with_digest']:.2f}")
        cells.append("/".join(_number(row[stage]["copies"], 1) for stage, _ in _STAGES))
        cells.append("/".join(_number(row[stage]["extra_memory_percent"], 1) for stage, _ in _STAGES))
        table.add_row(*cells, style="bold" if row["computes_digest"] else "")
    return table


def stage_line(rows: Sequence[Row]) -> str:
    """Single-thread seconds per GiB by stage."""
    found = [row for row in rows if row["bench"] == "stages"]
    parts = [f"{name} {cost:.3f}" for name, cost in found[0]["seconds_per_gib"].items()] if found else []
    return "One thread, s/GiB of state: " + ", ".join(parts)


def _label(axis: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each label beside its point (x, y, text, colour), at the nearest place where it covers nothing."""
    canvas = axis.figure.canvas
    canvas.draw()
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in (axis.transData.transform((x, y)) for x, y, _, _ in points)]
    room = axis.get_window_extent()
    for x, y, text, color in points:
        places = [(8, 0, "left"), (-8, 0, "right")]
        places += [
            (side * 8, step, "left" if side > 0 else "right")
            for step in (9, -9, 18, -18, 27, -27, 36, -36)
            for side in (1, -1)
        ]
        for dx, dy, align in places:
            note = axis.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", fontsize=8, color=color, ha=align, va="center",
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5} if abs(dy) > 9 else None,
            )  # fmt: skip
            box = note.get_window_extent(canvas.get_renderer())
            found = (box.x0, box.y0, box.x1, box.y1)
            inside = room.x0 < found[0] and found[2] < room.x1
            free = all(found[2] < t[0] or t[2] < found[0] or found[3] < t[1] or t[3] < found[1] for t in taken)
            if (inside and free) or (dx, dy, align) == places[-1]:
                taken.append(found)
                break
            note.remove()


def folder_lines(rows: Sequence[Row]) -> str:
    """Whole calls through a folder: speed and peak extra memory."""
    lines = []
    for row in (row for row in rows if row["bench"] == "end to end"):
        calls = [
            f"{call} {row[call]['best_gib_s']:.2f} ({row[call]['median_gib_s']:.2f}) GiB/s, "
            f"extra memory {_number(row[call]['extra_memory_percent'], 1)} %"
            for call in ("publish", "apply")
        ]
        lines.append(f"{row['codec']} through a folder: " + "; ".join(calls))
    return "\n".join(lines)


def codec_figure(rows: Sequence[Row], path: Path) -> None:
    """Size against speed, one panel a direction, as a PNG; what sends whole tensors is off the scale and left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    shown = _codecs(rows)
    entropy = shown[0]["entropy"]
    for axis, (stage, label) in zip(axes, _STAGES, strict=True):
        points = []
        for row in (row for row in shown if row["bytes_per_changed"] < _OFF_SCALE):
            color = _OURS if row["computes_digest"] else _THEIRS
            points.append((row[stage]["best_gib_s_with_digest"], row["bytes_per_changed"], row["codec"], color))
            axis.plot(*points[-1][:2], "o", markersize=8, color=color)
        for kind, style in (("plain", "--"), ("exponent", ":")):
            axis.axhline(entropy[kind], color=_BOUND, linewidth=1, linestyle=style)
        axis.set(xscale="log", xlabel="GiB of state a second, digest included", title=label, ylim=(0, 6.6))
        ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if _near(t, [p[0] for p in points])]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.grid(True, alpha=0.25)
        axis.margins(x=0.3)
        _label(axis, sorted(points, key=lambda p: p[1]))
    axes[0].set_ylabel("bytes per changed element")
    figure.suptitle(f"{_title(shown[0])} (dashed: entropy; dotted: with the exponents known)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _near(tick: float, values: Sequence[float]) -> bool:
    return min(values) / 2.5 <= tick <= max(values) * 2.5


def codec_html(rows: Sequence[Row], path: Path) -> None:
    """The same figure as one HTML file that needs nothing else.

    Raises:
        ImportError: Plotly is not installed.
    """
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    shown = [row for row in _codecs(rows) if row["bytes_per_changed"] < _OFF_SCALE]
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=[label for _, label in _STAGES])
    colors = dict(zip([row["codec"] for row in shown], cycle(qualitative.Dark24), strict=False))
    for column, (stage, _) in enumerate(_STAGES, start=1):
        for row in shown:
            ours, speed = row["computes_digest"], row[stage]["best_gib_s_with_digest"]
            symbol = "diamond" if ours else "circle"
            figure.add_trace(
                go.Scatter(
                    x=[speed],
                    y=[row["bytes_per_changed"]],
                    mode="markers",
                    marker={"size": 15 if ours else 11, "color": colors[row["codec"]], "symbol": symbol},
                    name=row["codec"],
                    legendgroup=row["codec"],
                    showlegend=column == 1,
                    hovertemplate="%{fullData.name}<br>%{y:.3f} B<br>%{x:.2f} GiB/s<extra></extra>",
                ),
                row=1,
                col=column,
            )
        for kind, dash in (("plain", "dash"), ("exponent", "dot")):
            figure.add_hline(shown[0]["entropy"][kind], line_dash=dash, line_color=_BOUND, row=1, col=column)
        figure.update_xaxes(type="log", title="GiB of state a second, digest included", dtick="D2", row=1, col=column)
    figure.update_yaxes(title="bytes per changed element", rangemode="tozero", row=1, col=1)
    figure.update_layout(title=f"{_title(shown[0])} (lines: entropy)", template="plotly_white")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)


def follow_table(row: Row) -> Table:
    """What happened, one fact a line."""
    table = Table(show_header=False)
    table.add_column("fact")
    table.add_column("figure", justify="right")
    facts = {
        "versions published": row["versions"],
        "consumers": row["consumers"],
        "kills (SIGKILL)": row["kills"],
        "joins": row["joins"],
        "digests reported from memory": row["reports"],
        "digest mismatches": len(row["mismatches"]),
        "consumers that did not reach the end": len(row["stalled"]),
        "crashes": len(row["crashes"]),
        "bytes published": f"{row['published_bytes']:,}",
        "as full checkpoints": f"{row['full_bytes']:,}",
        "share": f"{100 * row['share_of_full_checkpoints']:.2f} %",
        "seconds": row["seconds"],
    }
    for fact, figure in facts.items():
        table.add_row(fact, str(figure))
    return table


# --- a real trainer's versions --------------------------------------------------------------------------------------


def real_table(rows: Sequence[Row], total: Row) -> Table:
    """One line a codec: bytes per changed element over all steps, bytes a step, share of a full checkpoint."""
    low, high = (100 * share for share in total["density"])
    table = Table(
        title=f"{rows[0]['source']}: {len(rows)} steps, {low:.2f} to {high:.2f} % changed", title_justify="left"
    )
    for heading in ("codec", "least", "mean", "most", "bytes a step", "% of a full checkpoint"):
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    for name, (least, mean, most) in total["bytes_per_changed"].items():
        found = [_codec_of(row, name)["bytes"] for row in rows]
        share = 100 * sum(found) / sum(row["state_bytes"] for row in rows)
        cells = (f"{least:.3f}", f"{mean:.3f}", f"{most:.3f}", f"{sum(found) / len(found):,.0f}", f"{share:.3f}")
        table.add_row(name, *cells, style="bold" if name.startswith("thinwire") else "")
    for kind in ("plain", "exponent"):
        bits = [row["entropy"][kind] for row in rows]
        label = "entropy" if kind == "plain" else "entropy, exponents known"
        table.add_row(
            label, f"{min(bits):.3f}", f"{sum(bits) / len(bits):.3f}", f"{max(bits):.3f}", "", "", style="dim"
        )
    table.caption = f"Bytes per changed element. Every version exact: {total['exact']}."
    return table


def _codec_of(row: Row, name: str) -> Row:
    found: Row = row["thinwire"][name.removeprefix("thinwire ")] if name.startswith("thinwire ") else row["peers"][name]
    return found


def _real_lines(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    names = [f"thinwire {level}" for level in rows[0]["thinwire"]] + list(rows[0]["peers"])
    return {name: [_codec_of(row, name)["bytes_per_changed"] for row in rows] for name in names}


def real_figure(rows: Sequence[Row], path: Path) -> None:
    """Bytes per changed element over the steps, and the share that changed, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axis, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    at = [row["step"] for row in rows]
    ends: list[tuple[float, str, str]] = []
    for name, sizes in _real_lines(rows).items():
        color = _OURS if name.startswith("thinwire") else _THEIRS
        axis.plot(at, sizes, "o-", markersize=4, linewidth=2.2 if color == _OURS else 1, color=color)
        ends.append((sizes[-1] or 0.0, name, color))
    height = 0.0
    for size, name, color in sorted(ends):  # at least a line of text apart
        height = max(size, height + 0.2)
        axis.text(at[-1] + 0.4, height, f"{name}  {size:.2f}", fontsize=8, color=color, va="center")
    axis.set(ylabel="bytes per changed element", ylim=(0, 6.4), title=rows[0]["source"])
    below.plot(at, [100 * row["density"] for row in rows], "o-", markersize=4, color=_OURS)
    below.set(xlabel="step", ylabel="% changed", ylim=(0, 125 * max(row["density"] for row in rows)))
    below.set_xticks(at if len(at) <= 24 else at[::5])
    for each in (axis, below):
        each.grid(True, alpha=0.2)
        each.set_xlim(at[0] - 0.5, at[-1] + 0.25 * len(at) + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def real_html(rows: Sequence[Row], path: Path) -> None:
    """The same lines as one HTML file that needs nothing else.

    Raises:
        ImportError: Plotly is not installed.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, sizes in _real_lines(rows).items():
        ours = name.startswith("thinwire")
        line = {"width": 3 if ours else 1.5}
        figure.add_trace(go.Scatter(x=[row["step"] for row in rows], y=sizes, name=name, line=line))
    figure.update_layout(title=rows[0]["source"], template="plotly_white", xaxis_title="step")
    figure.update_yaxes(title="bytes per changed element", rangemode="tozero")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)

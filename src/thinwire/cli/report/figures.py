"""The figures of the report, one function each, as Plotly figures. The one file that imports Plotly here.

Backgrounds are transparent and greys are neutral; the page's script sets the ink for light and for dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from thinwire.cli.report.facts import ChainFacts, SkipFacts, VersionFacts
from thinwire.cli.report.heat import heat_of
from thinwire.errors import MisuseError

__all__ = ["figures_of", "script"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _RED, _GREY = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8f98"
)  # fmt: skip
_LEVELS = {"fast": _SKY, "small": _BLUE, "smallest": _PINK}
_FINE = ("ok", "given up")
_MARKERS_MAX = 120  # with more points than this a line is drawn without them


def _go() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise MisuseError("the report's figures need Plotly: pip install 'thinwire[report]'") from error
    return go


def script() -> str:
    """plotly.js itself, for a page that opens without a network.

    Raises:
        MisuseError: Plotly is not installed.
    """
    _go()
    from plotly.offline import get_plotlyjs

    found: str = get_plotlyjs()
    return found


def figures_of(facts: ChainFacts) -> list[tuple[str, str, str, Any]]:
    """What there is to draw: (id, title, one line about it, figure); what has no data is left out.

    Raises:
        MisuseError: Plotly is not installed.
    """
    read = [v for v in facts.versions if v.kind]
    heat = heat_of(facts.versions)
    found = []
    if read:
        note = "What each version put into the store, logarithmic."
        found.append(("bytes", "Bytes of each version", note, _bytes(facts)))
    if any(v.delta_bytes for v in read):
        note = "A patch's bytes by how many versions it spans, logarithmic."
        found.append(("steps", "Sizes of steps", note, _steps(read, facts.skips)))
    if any(v.density is not None and v.delta_bytes for v in read):
        found.append(("density", "Density", "Share of the elements that each version changed.", _density(read)))
    if any(v.interval_s is not None for v in read):
        found.append(("interval", "Time between versions", "By the publisher's clock.", _intervals(read)))
    if read:
        note = "What leads from version to version; skip deltas are arcs, higher the more they span."
        found.append(("lineage", "Lineage", note, _lineage(facts)))
    if heat.rows:
        note = "From the patches' tables, logarithmic; blank: no patch that could be read, or nothing to change."
        found.append(("heat", "Density by layer", note, _heat(heat)))
    return found


def _figure(height: int, **layout: Any) -> Any:
    figure = _go().Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 70, "r": 16, "t": 40, "b": 46},
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"namelength": -1},
        **layout,
    )
    figure.update_xaxes(gridcolor="rgba(138,143,152,0.25)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(138,143,152,0.25)", zeroline=False)
    return figure


def _version_axis(figure: Any, versions: Sequence[VersionFacts]) -> None:
    first, last = versions[0].version, versions[-1].version
    pad = max((last - first) * 0.02, 0.6)
    figure.update_xaxes(title="version", range=[first - pad, last + pad], tickformat="d")
    if last - first < 12:
        figure.update_xaxes(dtick=1)


def _bytes_axis(figure: Any, sizes: Sequence[int]) -> None:
    """A logarithmic axis over whole decades, so that there are always two labels to read it by."""
    low, high = math.floor(math.log10(min(sizes, default=1))), math.ceil(math.log10(max(sizes, default=10)) + 0.05)
    figure.update_yaxes(type="log", title="bytes", exponentformat="SI", dtick=1, range=[low - 0.05, max(high, low + 1)])


def _bytes(facts: ChainFacts) -> Any:
    figure = _figure(340)
    sizes = [n for v in facts.versions for n in (v.state_bytes, v.delta_bytes, v.anchor_bytes) if n and n > 0]
    _bytes_axis(figure, sizes)
    _version_axis(figure, facts.versions)
    full = [v for v in facts.versions if v.state_bytes]
    mode = "lines" if len(full) > 1 else "markers"
    figure.add_scatter(
        x=[v.version for v in full], y=[v.state_bytes for v in full], mode=mode, name="full checkpoint",
        line={"color": _GREY, "dash": "dash", "width": 2},
        marker={"symbol": "line-ew-open", "size": 14, "color": _GREY},
    )  # fmt: skip
    patches = [v for v in facts.versions if v.delta_bytes]
    for level in sorted({v.level for v in patches}):
        some = [v for v in patches if v.level == level]
        name = f"patch, {level}" if level else "patch, not read"
        colour = _LEVELS.get(level, _GREEN)
        figure.add_scatter(
            x=[v.version for v in some], y=[v.delta_bytes for v in some], mode="markers", name=html.escape(name),
            marker={"size": 6 if len(some) <= _MARKERS_MAX else 3.5, "color": colour},
        )  # fmt: skip
    anchors = [v for v in facts.versions if v.anchor_bytes]
    figure.add_scatter(
        x=[v.version for v in anchors], y=[v.anchor_bytes for v in anchors], mode="markers", name="anchor",
        marker={"color": _ORANGE, "size": 10 if len(anchors) < 30 else 5, "symbol": "square"},
    )  # fmt: skip
    return figure


def _density(versions: Sequence[VersionFacts]) -> Any:
    figure = _figure(300, showlegend=False)
    _version_axis(figure, versions)
    known = [v for v in versions if v.density is not None and v.delta_bytes]
    figure.update_yaxes(title="elements changed, %", rangemode="tozero")
    figure.add_scatter(
        x=[v.version for v in known], y=[100 * (v.density or 0) for v in known],
        mode="lines+markers" if len(known) <= _MARKERS_MAX else "lines",
        line={"color": _GREEN, "width": 2}, marker={"size": 6},
        hovertemplate="version %{x}: %{y:.3g} %<extra></extra>",
    )  # fmt: skip
    return figure


def _intervals(versions: Sequence[VersionFacts]) -> Any:
    figure = _figure(300, showlegend=False)
    _version_axis(figure, versions)
    figure.update_yaxes(title="seconds", rangemode="tozero")
    figure.add_scatter(
        x=[v.version for v in versions], y=[v.interval_s for v in versions],
        mode="lines+markers" if len(versions) <= _MARKERS_MAX else "lines",
        line={"color": _BLUE, "width": 2}, marker={"size": 6},
        hovertemplate="version %{x}: %{y:.3g} s after the one before<extra></extra>",
    )  # fmt: skip
    return figure


def _heat(heat: Any) -> Any:
    height = 150 + 17 * max(len(heat.rows), 4)
    figure = _figure(height)
    names = [html.escape(row if len(row) <= 44 else f"{row[:20]}…{row[-22:]}") for row in heat.rows]
    texts = [f"version {a}" if a == b else f"versions {a} to {b}" for a, b in heat.columns]
    shares = [value for row in heat.density for value in row if value]
    low = math.floor(math.log10(min(shares))) if shares else -6
    ticks = list(range(low, 1))
    z = [[None if v is None else math.log10(v) if v else low - 0.5 for v in row] for row in heat.density]
    labels = [["" if v is None else f"{100 * v:.3g} %" for v in row] for row in heat.density]
    figure.add_heatmap(
        x=[a for a, _ in heat.columns], y=list(range(len(names))), z=z, zmin=low - 0.5, zmax=0, colorscale="Viridis",
        text=labels, customdata=[[[text, name] for text in texts] for name in names], hoverongaps=False,
        hovertemplate="%{customdata[1]}<br>%{customdata[0]}: %{text}<extra></extra>",
        colorbar={
            "thickness": 12, "tickvals": ticks, "ticktext": [f"{100 * 10.0**t:g} %" for t in ticks],
            "title": {"text": "changed"},
        },
    )  # fmt: skip
    figure.update_xaxes(title="version", tickformat="d", showgrid=False)
    if len(heat.columns) <= 12:
        figure.update_xaxes(dtick=1)
    figure.update_yaxes(
        autorange="reversed", tickvals=list(range(len(names))), ticktext=names, automargin=True, showgrid=False,
        tickfont={"size": 11},
    )  # fmt: skip
    return figure


def _steps(versions: Sequence[VersionFacts], skips: Sequence[SkipFacts]) -> Any:
    figure = _figure(340)
    figure.update_xaxes(type="log", title="versions spanned", tickvals=[2**k for k in range(14)])
    deltas = [v for v in versions if v.delta_bytes and v.base is not None]
    figure.add_scatter(
        x=[v.version - (v.base or 0) for v in deltas], y=[v.delta_bytes for v in deltas], mode="markers", name="delta",
        marker={"color": _BLUE, "size": 7, "opacity": 0.6}, text=[f"to version {v.version}" for v in deltas],
        hovertemplate="%{text}: %{y:.3s}B<extra></extra>",
    )  # fmt: skip
    good = [s for s in skips if s.status == "ok"]
    if good:
        figure.add_scatter(
            x=[s.version - s.base for s in good], y=[s.bytes for s in good], mode="markers", name="skip delta",
            marker={"color": _GREEN, "size": 7, "opacity": 0.6, "symbol": "diamond"},
            text=[f"{s.base} to {s.version}" for s in good], hovertemplate="%{text}: %{y:.3s}B<extra></extra>",
        )  # fmt: skip
    anchors = [v.anchor_bytes for v in versions if v.anchor_bytes]
    spans = [v.version - (v.base or 0) for v in deltas] + [s.version - s.base for s in good]
    if anchors:
        figure.add_scatter(
            x=[0.8, max(spans, default=1) * 1.25], y=[anchors[-1]] * 2, mode="lines", name="newest anchor",
            line={"color": _ORANGE, "dash": "dash", "width": 2}, hoverinfo="y",
        )  # fmt: skip
    _bytes_axis(figure, [*(v.delta_bytes for v in deltas), *(s.bytes for s in good if s.bytes), *anchors[-1:]])
    return figure


def _arc(base: int, version: int, height: float) -> tuple[list[float | None], list[float | None]]:
    steps = 12
    xs: list[float | None] = [base + (version - base) * k / steps for k in range(steps + 1)]
    ys: list[float | None] = [height * math.sin(math.pi * k / steps) for k in range(steps + 1)]
    return [*xs, None], [*ys, None]


def _lineage(facts: ChainFacts) -> Any:
    """Versions on a line, deltas along it, skip deltas above it, what is wrong in red."""
    spans = [s.version - s.base for s in facts.skips if s.status == "ok"]
    top = math.log2(max(spans)) + 1 if spans else 1.0
    figure = _figure(230 if not spans else 310)
    _version_axis(figure, facts.versions)
    figure.update_yaxes(range=[-0.22 * top, 1.08 * top], showticklabels=False, showgrid=False)
    xs: list[float | None] = []
    ys: list[float | None] = []
    for skip in (s for s in facts.skips if s.status == "ok"):
        x, y = _arc(skip.base, skip.version, math.log2(skip.version - skip.base) + 1)
        xs, ys = xs + x, ys + y
    if xs:
        figure.add_scatter(
            x=xs, y=ys, mode="lines", name="skip delta", line={"color": _GREEN, "width": 1}, hoverinfo="skip"
        )
    lines: list[float | None] = []
    for v in facts.versions:
        if v.delta_bytes and v.base is not None and v.status == "ok":
            lines += [v.base, v.version, None]
    figure.add_scatter(
        x=lines, y=[None if x is None else 0 for x in lines], mode="lines", name="delta",
        line={"color": _BLUE, "width": 3}, hoverinfo="skip",
    )  # fmt: skip
    small = len(facts.versions) > _MARKERS_MAX
    groups = [
        ("version", [v for v in facts.versions if v.status == "ok" and not v.anchor_bytes],
         {"color": _BLUE, "size": 3 if small else 8}),
        ("anchor", [v for v in facts.versions if v.status == "ok" and v.anchor_bytes],
         {"color": _ORANGE, "size": 8 if small else 13, "symbol": "square"}),
        ("given up by gc", [v for v in facts.versions if v.status == "given up"],
         {"color": _GREY, "size": 4 if small else 8, "symbol": "circle-open"}),
        ("missing, damaged or contradicting", [v for v in facts.versions if v.status not in _FINE],
         {"color": _RED, "size": 11, "symbol": "x"}),
    ]  # fmt: skip
    for name, some, marker in groups:
        if some:
            figure.add_scatter(
                x=[v.version for v in some], y=[0] * len(some), mode="markers", name=name, marker=marker,
                text=[_label(v) for v in some], hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
    return figure


def _label(v: VersionFacts) -> str:
    sizes = [f"{name} {size:,} bytes" for name, size in (("delta", v.delta_bytes), ("anchor", v.anchor_bytes)) if size]
    lines = [f"version {v.version}: {v.status}", *sizes]
    if v.base is not None:
        lines.append(f"from version {v.base}")
    return "<br>".join(html.escape(line) for line in lines)

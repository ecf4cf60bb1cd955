"""The figures of the demo's page, one function each, as Plotly figures."""

from __future__ import annotations

from typing import Any

from thinwire.lab.demo.live import smooth
from thinwire.lab.demo.picture import Picture
from thinwire.lab.demo.summary import DemoSummary

__all__ = ["bytes_chart", "density_chart", "reward_chart", "stages_chart", "timeline_chart"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8f98"
)  # fmt: skip
_STAGE_COLOURS = (BLUE, SKY, GREEN, ORANGE, PINK, RED, GREY, "#f0e442")
_MARKS = {"kill": ("x", RED, "killed"), "restart": ("triangle-up", GREEN, "back"), "join": ("star", PINK, "joins late")}


def _figure(height: int, **layout: Any) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 64, "r": 20, "t": 44, "b": 48},
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"namelength": -1},
        **layout,
    )
    return figure


def reward_chart(picture: Picture, summary: DemoSummary) -> Any:
    """Reward of the rollouts of each step, its running mean, and the held-out reward before and after."""
    figure = _figure(340, xaxis_title="optimiser step", yaxis_title="mean reward")
    steps = [event["step"] for event in picture.steps]
    rewards = [event["reward"] for event in picture.steps]
    window = max(1, min(20, len(rewards) // 3))
    figure.add_scatter(
        x=steps, y=rewards, mode="markers", name="rollouts of a step", marker={"color": SKY, "size": 5, "opacity": 0.6}
    )
    figure.add_scatter(
        x=steps[window - 1 :], y=smooth(rewards, window)[window - 1 :], mode="lines", name=f"mean of {window} steps",
        line={"color": BLUE, "width": 3},
    )  # fmt: skip
    figure.add_scatter(
        x=[0, steps[-1]], y=[summary.reward_before, summary.reward_after], mode="markers+text",
        name="held-out problems, before and after", marker={"color": RED, "size": 12, "symbol": "diamond"},
        text=[f"{summary.reward_before:.3f}", f"{summary.reward_after:.3f}"],
        textposition=["top right", "top left"], textfont={"color": RED, "size": 14}, cliponaxis=False,
    )  # fmt: skip
    return figure


def bytes_chart(picture: Picture) -> Any:
    """Bytes of each version on a logarithmic scale: patches, anchors, and a full checkpoint for comparison."""
    figure = _figure(340, xaxis_title="version", yaxis_title="bytes")
    figure.update_yaxes(type="log", exponentformat="SI", dtick=1)
    versions = [event["version"] for event in picture.published]
    figure.add_scatter(
        x=versions, y=[event["full_bytes"] for event in picture.published], mode="lines", name="full checkpoint",
        line={"color": GREY, "dash": "dash", "width": 2},
    )  # fmt: skip
    patches = [event for event in picture.published if event["patch_bytes"]]
    figure.add_scatter(
        x=[event["version"] for event in patches], y=[event["patch_bytes"] for event in patches], mode="lines+markers",
        name="patch", line={"color": BLUE, "width": 2}, marker={"size": 4},
    )  # fmt: skip
    anchors = [event for event in picture.published if event["anchor_bytes"]]
    if anchors:
        figure.add_scatter(
            x=[event["version"] for event in anchors], y=[event["total_bytes"] for event in anchors], mode="markers",
            name="with an anchor", marker={"color": ORANGE, "size": 10, "symbol": "square"},
        )  # fmt: skip
    return figure


def density_chart(picture: Picture) -> Any:
    """Share of the bf16 weights that each step changed, per cent."""
    figure = _figure(300, xaxis_title="optimiser step", yaxis_title="weights changed, %", showlegend=False)
    figure.update_yaxes(rangemode="tozero")
    figure.add_scatter(
        x=[event["step"] for event in picture.steps], y=[100 * event["density"] for event in picture.steps],
        mode="lines", line={"color": GREEN, "width": 2}, fill="tozeroy", fillcolor="rgba(0,158,115,0.12)",
        hovertemplate="step %{x}: %{y:.2f} %<extra></extra>",
    )  # fmt: skip
    return figure


def timeline_chart(picture: Picture) -> Any:
    """One lane a worker, coloured by the version it holds; faults and arrivals are marked."""
    names = sorted(picture.workers, reverse=True)
    figure = _figure(130 + 58 * len(names), xaxis_title="seconds since the start", barmode="overlay")
    figure.update_layout(legend={"y": 1.06})
    spans = [(worker.name, span) for worker in picture.workers.values() for span in worker.spans]
    newest = max(event["version"] for event in picture.published)
    figure.add_bar(
        orientation="h",
        y=[name for name, _ in spans],
        base=[span.start for _, span in spans],
        x=[(span.end if span.end is not None else picture.now) - span.start for _, span in spans],
        marker={
            "color": [span.version for _, span in spans], "colorscale": "Viridis", "cmin": 0, "cmax": newest,
            "line": {"width": 0}, "colorbar": {"title": "version", "thickness": 12, "len": 1.0},
        },
        customdata=[[span.version, span.life] for _, span in spans],
        hovertemplate="%{y}, life %{customdata[1]}<br>version %{customdata[0]}<br>from %{base:.1f} s<extra></extra>",
        showlegend=False,
        width=0.62,
    )  # fmt: skip
    for action, (symbol, colour, label) in _MARKS.items():
        marked = [(at, target) for at, target, done in picture.marks if done == action]
        if marked:
            figure.add_scatter(
                x=[at for at, _ in marked], y=[target for _, target in marked], mode="markers", name=label,
                marker={"symbol": symbol, "color": colour, "size": 14, "line": {"color": "white", "width": 1.5}},
            )  # fmt: skip
    figure.update_yaxes(categoryorder="array", categoryarray=names)
    figure.update_xaxes(range=[0, picture.now])
    return figure


def stages_chart(summary: DemoSummary) -> Any:
    """Median time of each stage of publishing and of applying a version, stacked, in milliseconds."""
    figure = _figure(230, xaxis_title="milliseconds, median", barmode="stack")
    rows = {"publish": "publish (trainer)", "apply": "follow (worker)"}
    stages = list(dict.fromkeys(stage for side in rows for stage in summary.seconds[side] if stage != "total"))
    for number, stage in enumerate(stages):
        times = [1000 * summary.seconds[side].get(stage, 0.0) for side in rows]
        figure.add_bar(
            orientation="h", y=list(rows.values()), x=times, name=stage,
            marker={"color": _STAGE_COLOURS[number % len(_STAGE_COLOURS)]},
            hovertemplate=f"{stage}: %{{x:.1f}} ms<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(margin={"l": 130}, legend={"traceorder": "normal"})
    return figure

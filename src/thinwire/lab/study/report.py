"""The study in words: findings as Markdown, and as a page with interactive figures."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire.errors import MisuseError
from thinwire.lab.study.figures import FIGURES, estimate_text
from thinwire.lab.study.findings import Finding
from thinwire.lab.study.matrix import LEVELS
from thinwire.lab.study.statistics import mean_of
from thinwire.lab.study.summary import Summary

__all__ = [
    "conditions_markdown",
    "findings_markdown",
    "prediction_markdown",
    "sharpness_markdown",
    "write_page",
]

_SIGNS = {"supported": "supported", "refuted": "**refuted**", "undecided": "undecided"}


def findings_markdown(findings: Sequence[Finding]) -> str:
    """A table of verdicts, and a section for each finding with its estimates."""
    lines = ["| hypothesis | verdict |", "|---|---|"]
    lines += [f"| [{f.hypothesis}](#{f.name}) | {_SIGNS[f.verdict]} |" for f in findings]
    for f in findings:
        lines += [
            "",
            f"### {f.name}",
            "",
            f"*{f.hypothesis[0].upper()}{f.hypothesis[1:]}*: **{f.verdict}**. {f.why}",
            "",
        ]
        lines += ["| | mean and 95 % interval | n |", "|---|---|---|"]
        lines += [f"| {e.label} | {estimate_text(e.estimate, e.unit)} | {e.estimate.count} |" for e in f.lines]
    return "\n".join(lines) + "\n"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
img { max-width: 100%; background: white }
td, th { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
h2 { margin-top: 2.5rem }
.supported { color: #00794f } .refuted { color: #b3261e } .undecided { color: #666 } figcaption { color: #555 }
@media (prefers-color-scheme: dark) {
  body { background: #16181a; color: #e6e6e6 } td, th { border-color: #444 } a { color: #8ab4f8 }
  figcaption { color: #aaa } .supported { color: #4cc38a } .refuted { color: #ff8a80 } .undecided { color: #999 }
}
"""


def _plot(summaries: Sequence[Summary]) -> str:
    """Every run as a point: density against learning rate, with its axes on hover."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise MisuseError("the page needs Plotly: pip install 'thinwire[study]'") from error
    figure = go.Figure()
    for objective, symbol in (("rl", "circle"), ("sft", "square"), ("pretrain", "diamond")):
        runs = [s for s in summaries if s["objective"] == objective and s["shares"]["1"][0] > 0]
        text = [
            f"{s['optimiser']}, lr {s['lr_value']:g}, {s['size']}, {s['task']}, {s['weights']}<br>control "
            f"{s['control']}, enforce {s['enforce']}, seed {s['seed']}<br>gain {s['gain']:+.3f}"
            for s in runs
        ]
        figure.add_trace(go.Scatter(
            x=[100 * s["shares"]["1"][1] for s in runs], y=[100 * s["shares"]["1"][0] for s in runs], text=text,
            mode="markers", name=objective, marker={"symbol": symbol, "size": 8, "opacity": 0.7},
            hovertemplate="%{text}<br>null %{x:.3g} %, observed %{y:.3g} %<extra></extra>",
        ))  # fmt: skip
    low = min((100 * min(s["shares"]["1"]) for s in summaries if min(s["shares"]["1"]) > 0), default=0.01)
    figure.add_trace(go.Scatter(x=[low, 100], y=[low, 100], mode="lines", name="observed = null",
                                line={"dash": "dot", "color": "gray"}, hoverinfo="skip"))  # fmt: skip
    figure.update_xaxes(type="log", title="null: changed by random gradients in a step, %")
    figure.update_yaxes(type="log", title="observed: changed in a step, %")
    figure.update_layout(height=560, template="plotly_white", margin={"t": 30})
    return str(figure.to_html(full_html=False, include_plotlyjs=True))


def write_page(
    summaries: Sequence[Summary], findings: Sequence[Finding], pictures: Sequence[Path], path: Path,
    about: Mapping[str, Any],
) -> None:  # fmt: skip
    """One HTML file with everything in it: verdicts, estimates, the pictures, and every run as a point.

    Raises:
        MisuseError: Plotly is not installed.
    """
    title = html.escape(str(about.get("title", "Which weights move")))
    minutes = sum(s["seconds"] for s in summaries) / 60
    parts = [
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>",
        f"<p>{len(summaries)} runs, {minutes:.0f} minutes of one core. The null is the share of weights that random",
        "gradients would change, at the same data type, learning rate, optimiser and weights. Learning rates are",
        f"{', '.join(LEVELS)} by optimiser.</p><h2>Verdicts</h2><table>",
    ]
    for f in findings:
        parts.append(f"<tr><td><a href='#{f.name}'>{html.escape(f.hypothesis)}</a><td class={f.verdict}>{f.verdict}")
    parts.append("</table><h2>Every run</h2>" + _plot(summaries))
    parts += [_picture(picture) for picture in pictures]
    for f in findings:
        parts.append(f"<h2 id='{f.name}'>{html.escape(f.hypothesis)}</h2><p class={f.verdict}>{f.verdict}</p>")
        parts.append(f"<p>{html.escape(f.why)}</p><table>")
        for e in f.lines:
            text = estimate_text(e.estimate, e.unit)
            parts.append(f"<tr><td>{html.escape(e.label)}<td class=n>{text}<td>n = {e.estimate.count}")
        parts.append("</table>")
    path.write_text("\n".join(parts))


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(FIGURES[path.stem][2])
    image = f"<img src='data:image/png;base64,{data}' alt='{caption}'>"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def sharpness_markdown(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What smoothed advantages make of density, beside plain ones: a column for each set of rows, by its title."""
    from thinwire.lab.sharpness import summarise

    found = {title: summarise([dict(row) for row in rows]) for title, rows in runs.items()}
    kinds = list(dict.fromkeys((line["smoothing"], line["level"]) for lines in found.values() for line in lines))
    heading = ["advantages", *(f"{title} ({lines[0]['seeds']} seeds)" for title, lines in found.items())]
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * len(found)]
    for kind in kinds[1:]:
        cells = [kind[0] + (f" {kind[1]:g}" if kind[1] else "")]
        for title in found:
            plain = found[title][0]["density"]
            line = next(one for one in found[title] if (one["smoothing"], one["level"]) == kind)
            cells.append(f"{100 * line['density_gap'] / plain:+.1f} ± {100 * line['density_error'] / plain:.1f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def prediction_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Average precision of each predictor in each setting, beside that of chance."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    lines = ["| predictor | " + " | ".join(settings) + " |", "|---|" + "---:|" * len(settings)]
    for name in dict.fromkeys(row["predictor"] for row in rows):
        by = {row["setting"]: row for row in rows if row["predictor"] == name}
        cells = [f"{by[s]['average_precision']:.3f} ({by[s]['base_rate']:.3f})" if s in by else "" for s in settings]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def conditions_markdown(summaries: Sequence[Summary], names: Mapping[tuple[str, str], str]) -> str:
    """What changed in a step in each condition, by its objective and control: observed, null, and the difference."""
    lines = ["| | changed in a step | null | beyond it | seeds |", "|---|---:|---:|---:|---:|"]
    for (objective, control), title in names.items():
        shares = [s["shares"]["1"] for s in summaries if (s["objective"], s["control"]) == (objective, control)]
        if not shares:
            continue
        beyond = mean_of([observed - null for observed, null in shares])
        observed, null = (mean_of([share[side] for share in shares]) for side in (0, 1))
        cells = [estimate_text(one, "%") for one in (observed, null, beyond)]
        lines.append("| " + " | ".join([title, *cells, str(len(shares))]) + " |")
    return "\n".join(lines)

"""The leaderboard as one static page: a table that sorts by a click, no network, nothing loaded."""

from __future__ import annotations

import html
from typing import Any

__all__ = ["page"]

_COLUMNS = (
    ("score", "score, %", 100, 1), ("gain", "gain, points", 100, 1), ("forgetting", "forgotten, points", 100, 1),
    ("sync_bytes", "sent a step, KiB", 1 / 1024, 1), ("changed", "changed, %", 100, 2), ("null", "null, %", 100, 2),
    ("excess", "excess, %", 100, 2), ("optimizer_bytes", "optimiser, KiB", 1 / 1024, 0), ("trainable", "trained", 1, 0),
    ("flops", "GFLOP", 1e-9, 0), ("memory", "memory, MiB", 2**-20, 0), ("seconds", "seconds", 1, 1),
)  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.finding { padding: .8rem 1rem; border-left: 4px solid #1f77b4; background: #1f77b41a; }
small { opacity: .75; }
"""

_SCRIPT = """
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") !== "descending";
  head.parentNode.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.cells[column].dataset.value;
  [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b);
    const order = x !== "" && y !== "" && !isNaN(x) && !isNaN(y) ? x - y : x.localeCompare(y);
    return down ? -order : order;
  }).forEach((row) => body.append(row));
}));
"""


def page(board: dict[str, Any]) -> str:
    """The page of a leaderboard, as :func:`thinwire.bench.sparserl_report.leaderboard` makes it."""
    metrics = board["metrics"]
    head = "".join(
        f'<th scope="col" title="{html.escape(metrics.get(key, ""))}">'
        f'<button type="button">{html.escape(name)}</button></th>'
        for key, name in [("model", "model"), ("method", "method"), *((key, name) for key, name, *_ in _COLUMNS)]
    )
    rows = "\n".join(_row(entry) for entry in board["entries"])
    verdicts = "\n".join(
        f"<li>{html.escape(c['method'])} against {html.escape(c['against'])}: <b>{c['verdict']}</b>, "
        f"{100 * c['bootstrap']['mean']:+.1f} points ({100 * c['bootstrap']['low']:+.1f} to "
        f"{100 * c['bootstrap']['high']:+.1f})</li>"
        for c in board["comparisons"]
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>SparseRL leaderboard</title><style>{_STYLE}</style></head><body>
<h1>SparseRL leaderboard</h1>
<p class="finding">{html.escape(board["finding"])}</p>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table></div>
<p><small>Means over tasks and seeds; a heading says what it is when it is pointed at, and sorts when it is
clicked.</small></p>
<h2>Comparisons</h2><p>Paired differences of the score, 95 % bootstrap intervals.</p><ul>
{verdicts}
</ul><script>{_SCRIPT}</script></body></html>
"""


def _row(entry: dict[str, Any]) -> str:
    cells = []
    for key, _, scale, digits in _COLUMNS:
        value = entry[key]
        shown = "" if value is None else f"{scale * value:,.{digits}f}"
        if key == "score":
            low, high = (100 * entry["score_interval"][end] for end in ("low", "high"))
            shown += f" <small>({low:.1f} to {high:.1f})</small>"
        cells.append(f'<td data-value="{"" if value is None else value}">{shown}</td>')
    names = "".join(
        f'<td data-value="{html.escape(entry[key])}">{html.escape(entry[key])}</td>' for key in ("model", "method")
    )
    return f"<tr>{names}{''.join(cells)}</tr>"

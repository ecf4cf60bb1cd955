"""The report as one HTML file with everything in it, plotly.js among it, that opens without a network."""

from __future__ import annotations

import html
import time
from pathlib import Path
from typing import Any

from thinwire.cli.output import bytes_text, count_text, share_text
from thinwire.cli.report.facts import ChainFacts, VersionFacts
from thinwire.cli.report.figures import figures_of, script
from thinwire.sync.files import write_file

__all__ = ["page_of", "write_page"]

_ROWS_MAX = 200
_PROBLEMS_MAX = 100
_WIDE = ("lineage", "heat")
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #596273; --line: #e0e4ea; --back: #f6f7f9; --card: #fff;
  --good: #067647; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #a2abba; --line: #353c48; --back: #14171c;
  --card: #1d2129; --good: #4cc38a; --bad: #ff8b7b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 26px 20px 60px; }
h1 { font-size: 25px; margin: 0 0 2px; overflow-wrap: anywhere; } h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0 0 8px; } .dim { color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 20px 0 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 15px 17px; min-width: 0; }
.tile b { display: block; font-size: 24px; line-height: 1.25; white-space: nowrap; }
.tile small { color: var(--dim); font-size: 13px; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; margin-top: 14px; }
.wide { grid-column: 1 / -1; }
@media (max-width: 900px) { .grid { grid-template-columns: minmax(0, 1fr); } .wide { grid-column: auto; } }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 4px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; background: var(--card); position: sticky; top: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.why { white-space: normal; min-width: 240px; overflow-wrap: anywhere; }
code { font: 12.5px ui-monospace, "DejaVu Sans Mono", monospace; }
.scroll { max-height: 440px; overflow: auto; margin-top: 8px; }
.ok { color: var(--good); } .no { color: var(--bad); font-weight: 650; }
ul.problems { margin: 6px 0 0; padding-left: 18px; max-height: 240px; overflow: auto; overflow-wrap: anywhere; }
"""
_INK = """
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const ink = () => {
    const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink").trim();
    const card = style.getPropertyValue("--card").trim();
    for (const plot of document.querySelectorAll(".js-plotly-plot"))
      Plotly.relayout(plot, {"font.color": ink, "hoverlabel.bgcolor": card, "hoverlabel.font.color": ink});
  };
  ink(); dark.addEventListener("change", ink);
})();
"""


def write_page(facts: ChainFacts, path: Path) -> Path:
    """Write the page to ``path``, whole or not at all. About 5 MB, nearly all of it plotly.js.

    Raises:
        MisuseError: Plotly is not installed.
    """
    write_file(path, [page_of(facts).encode()])
    return path


def page_of(facts: ChainFacts, *, now_s: float | None = None) -> str:
    """The page's HTML. Names, addresses and messages in it are the store's, so all are escaped."""
    figures = figures_of(facts)
    alone = len([name for name, *_ in figures if name not in _WIDE]) % 2
    cards = "".join(_card(*parts, wide=parts[0] in _WIDE or (not k and alone)) for k, parts in enumerate(figures))
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s))
    title = html.escape(f"thinwire report: {facts.store}")
    first, last = facts.versions[0].version, facts.versions[-1].version
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style><script>{script()}</script></head>
<body><main>
<h1>{html.escape(facts.store)}</h1>
<p class="dim">{"Version" if first == last else "Versions"} {first}{"" if first == last else f" to {last}"};
made by <code>thinwire report</code>, {made}.</p>
<div class="tiles">{_tiles(facts)}</div>
{_health(facts)}
<div class="grid">{cards}{_table(facts)}</div>
</main><script>{_INK}</script></body></html>
"""


def _tiles(facts: ChainFacts) -> str:
    totals = facts.totals
    newest = next((v for v in reversed(facts.versions) if v.kind), None)
    shares = sorted(v.density for v in facts.versions if v.density is not None and "delta" in v.kind)
    tiles = [
        (count_text(totals.versions), f"versions, {count_text(totals.anchors)} with an anchor"
         + (f"; {count_text(totals.given_up)} given up by gc" if totals.given_up else "")),
        ("–" if totals.saved is None else f"{100 * totals.saved:.1f} %",
         f"saved: {bytes_text(totals.published_bytes)} published, {bytes_text(totals.full_bytes)} as full checkpoints"),
        (bytes_text(totals.stored_bytes), "in the store now"
         + (f", {bytes_text(totals.skip_bytes)} of it skip deltas" if totals.skip_bytes else "")),
        (share_text(shares[len(shares) // 2], 1) if shares else "–", "of the elements change in a version (median)"),
    ]  # fmt: skip
    if newest is not None:
        step = f", step {newest.step}" if newest.step is not None else ""
        tiles.append((f"version {facts.newest}", f"is the newest{step if newest.version == facts.newest else ''}"))
    return "".join(
        f'<div class="card tile"><b>{html.escape(value)}</b><small>{html.escape(label)}</small></div>'
        for value, label in tiles
    )


def _health(facts: ChainFacts) -> str:
    unsigned = sum(v.signatures == 0 for v in facts.versions if v.kind)
    signed = sum(v.signatures > 0 for v in facts.versions if v.kind)
    if not signed:
        trust = "No version shown is signed."
    else:
        trust = f"{signed} of the versions shown carry signatures, which are not checked here; {unsigned} carry none."
    note = f'<p class="dim" style="margin:4px 0 0">{trust} Digests of objects are checked by thinwire verify.</p>'
    if not facts.problems:
        text = "links are whole, every object that is needed is there, with the size that its manifest names"
        return f'<section class="card" id="health"><span class="ok">✓</span> {text}{note}</section>'
    items = "".join(
        f"<li><code>{html.escape(p.where)}</code>: {html.escape(p.message)}</li>"
        for p in facts.problems[:_PROBLEMS_MAX]
    )
    more = len(facts.problems) - _PROBLEMS_MAX
    items += f"<li>and {more} more</li>" if more > 0 else ""
    count = f"{len(facts.problems)} problem{'s' if len(facts.problems) > 1 else ''}"
    return (
        f'<section class="card" id="health"><span class="no">✗ {count}</span><ul class="problems">{items}</ul>{note}'
        "</section>"
    )


def _card(name: str, title: str, note: str, figure: Any, *, wide: bool | int) -> str:
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"figure-{name}",
        config={"displayModeBar": False, "responsive": True},
    )  # fmt: skip
    return (
        f'<section class="card{" wide" if wide else ""}"><h2>{html.escape(title)}</h2>'
        f'<p class="dim">{html.escape(note)}</p>{drawn}</section>'
    )


def _table(facts: ChainFacts) -> str:
    shown = facts.versions[::-1][:_ROWS_MAX]
    heads = [
        ("version", "n"), ("step", "n"), ("made", ""), ("kind", ""), ("level", ""), ("delta", "n"), ("anchor", "n"),
        ("changed", "n"), ("signatures", "n"), ("state", ""), ("status", ""),
    ]  # fmt: skip
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in heads)
    note = f"The newest {len(shown)} of {len(facts.versions)}." if len(shown) < len(facts.versions) else "Newest first."
    rows = "".join(_row(version) for version in shown)
    return (
        f'<section class="card wide"><h2>Versions</h2><p class="dim">{note}</p><div class="scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(v: VersionFacts) -> str:
    made = "" if v.created_ms is None else _time_text(v.created_ms)
    numbers = [
        ("n", str(v.version)), ("n", "" if v.step is None else str(v.step)), ("", made), ("", v.kind), ("", v.level),
        ("n", bytes_text(v.delta_bytes) if v.delta_bytes else ""),
        ("n", bytes_text(v.anchor_bytes) if v.anchor_bytes else ""),
        ("n", "" if v.density is None else share_text(v.density, 1)),
        ("n", ("unsigned" if v.signatures == 0 else "malformed" if v.signatures < 0 else str(v.signatures))
         if v.kind else ""),
    ]  # fmt: skip
    cells = "".join(f'<td class="{kind}">{html.escape(text)}</td>' for kind, text in numbers)
    css = {"ok": "ok", "given up": "dim"}.get(v.status, "no")
    why = html.escape("; ".join([v.status, *v.problems]))
    return (
        f"<tr>{cells}<td><code>{html.escape(v.state[:12])}</code></td>"
        f'<td class="why"><span class="{css}">{why}</span></td></tr>'
    )


def _time_text(created_ms: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(created_ms / 1000))
    except (OverflowError, ValueError, OSError):  # a publisher may write any integer
        return str(created_ms)

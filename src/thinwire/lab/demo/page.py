"""The demo's page: one HTML file with everything in it, plotly.js among it, that opens without a network."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

from thinwire.lab.demo import charts
from thinwire.lab.demo.live import byte_text
from thinwire.lab.demo.picture import Picture
from thinwire.lab.demo.summary import DemoSummary

__all__ = ["write_page"]

_STYLE = """
:root { --ink: #1c2330; --dim: #667085; --line: #e4e7ec; --good: #067647; --bad: #b42318; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0 0 8px; } .dim { color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 22px 0; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; min-width: 0; }
.tile b { display: block; font-size: 25px; line-height: 1.25; font-weight: 650; white-space: nowrap; }
.tile small { color: var(--dim); font-size: 13px; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
.wide { grid-column: 1 / -1; }
@media (max-width: 900px) { .grid { grid-template-columns: 1fr; } }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 4px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; background: #fff; position: sticky; top: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font: 12.5px ui-monospace, "DejaVu Sans Mono", monospace; }
.scroll { max-height: 420px; overflow: auto; margin-top: 10px; }
.ok { color: var(--good); } .no { color: var(--bad); font-weight: 700; }
ul.checks { list-style: none; margin: 0; padding: 0; }
ul.checks li { padding: 3px 0; }
"""


def write_page(picture: Picture, summary: DemoSummary, path: Path) -> Path:
    """Write the page to ``path`` and return it. About 5 MB, nearly all of it plotly.js."""
    from plotly.offline import get_plotlyjs

    plan = picture.plan
    title = f"thinwire demo: {plan.model}, {summary.steps} steps"
    sections = [
        _card("Reward", f"What the rollouts earned, {len(picture.workers)} workers together.",
              charts.reward_chart(picture, summary)),
        _card("Bytes for each version", "A patch against a full bf16 checkpoint, logarithmic.",
              charts.bytes_chart(picture)),
        _card("Who ran which version when", "Gaps are workers that were dead or had not joined.",
              charts.timeline_chart(picture), wide=True),
        _card("Density", f"Share of {summary.weights:,} bf16 weights that a step changed; AdamW, lr {plan.lr:g}.",
              charts.density_chart(picture)),
        _card("Time for each stage", f"An optimiser step took {1000 * summary.seconds['step']['total']:.0f} ms.",
              charts.stages_chart(summary)),
        _workers_card(summary),
        _table_card(picture),
    ]  # fmt: skip
    body = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>
<body><main>
<h1>Asynchronous RL over thinwire</h1>
<p class="dim">{html.escape(_subtitle(picture, summary))}</p>
<div class="tiles">{_tiles(summary)}</div>
<div class="card" style="margin-bottom:14px"><ul class="checks">{_checks(summary)}</ul></div>
<div class="grid">{"".join(sections)}</div>
</main></body></html>
"""
    aside = path.with_suffix(".partial")
    aside.write_text(body, encoding="utf-8")
    os.replace(aside, path)
    return path


def _subtitle(picture: Picture, summary: DemoSummary) -> str:
    return (
        f"{picture.plan.about[:1].upper()}{picture.plan.about[1:]}. A trainer fine-tuned it with GRPO (bf16 weights, "
        f"AdamW on fp32 masters) and published every step; {len(picture.workers)} workers followed the store, sampled "
        f"with the weights they held and reported their digests. Seed {summary.seed}, {summary.steps} steps in "
        f"{summary.learning_s:.0f} s, {summary.run_s:.0f} s in all. Rollouts were {summary.staleness_mean:.1f} "
        "versions old on average."
    )


def _tiles(summary: DemoSummary) -> str:
    saved = 1 - summary.sent_bytes / summary.all_full_bytes
    same = summary.digests_compared - summary.digest_mismatches
    tiles = [
        (f"{summary.reward_before:.3f} → {summary.reward_after:.3f}", "held-out reward, sampled"),
        (
            f"{100 * saved:.1f} %",
            f"saved: {byte_text(summary.sent_bytes)} sent, not {byte_text(summary.all_full_bytes)}",
        ),
        (byte_text(summary.patch_bytes), f"median patch; a checkpoint is {byte_text(summary.full_checkpoint_bytes)}"),
        (f"{100 * summary.density_median:.2f} %", f"of the weights change in a step, at lr {summary.lr:g}"),
        (f"{same} / {summary.digests_compared}", f"digests equal, over {summary.versions} versions"),
    ]
    return "".join(
        f'<div class="card tile"><b>{html.escape(value)}</b><small>{html.escape(label)}</small></div>'
        for value, label in tiles
    )


def _checks(summary: DemoSummary) -> str:
    return "".join(
        f'<li><span class="{"ok" if check.passed else "no"}">{"✓" if check.passed else "✗"}</span> '
        f'{html.escape(check.name)} <span class="dim">({html.escape(check.detail)})</span></li>'
        for check in summary.checks
    )


def _card(title: str, note: str, figure: Any, *, wide: bool = False) -> str:
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True},
    )  # fmt: skip
    return (
        f'<section class="card{" wide" if wide else ""}"><h2>{html.escape(title)}</h2>'
        f'<p class="dim">{html.escape(note)}</p>{drawn}</section>'
    )


def _workers_card(summary: DemoSummary) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(worker.name)}</td><td class="n">{worker.lives}</td><td class="n">{worker.versions}</td>'
        f'<td class="n">{worker.last_version}</td><td class="n">{byte_text(worker.bytes_fetched)}</td>'
        f'<td class="n">{byte_text(worker.versions * summary.full_checkpoint_bytes)}</td>'
        f'<td class="n">{worker.answers:,}</td></tr>'
        for worker in summary.workers
    )
    heads = ("lives", "versions run", "last version", "fetched", "as full checkpoints", "answers sampled")
    return (
        '<section class="card wide"><h2>Workers</h2><p class="dim">A worker that starts, again or late, fetches the '
        "newest anchor and the patches after it.</p><table><thead><tr><th>worker</th>"
        + "".join(f'<th class="n">{head}</th>' for head in heads)
        + f"</tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _table_card(picture: Picture) -> str:
    names = sorted(picture.workers)
    ran: dict[str, dict[int, set[str]]] = {name: {} for name in names}
    for name in names:
        for version, digest in picture.workers[name].ran:
            ran[name].setdefault(version, set()).add(digest)

    def cell(name: str, version: int, digest: str) -> str:
        found = ran[name].get(version)
        if not found:
            return '<td class="dim">–</td>'
        if found == {digest}:
            return '<td class="ok">= same</td>'
        return f'<td class="no">≠ {html.escape(", ".join(sorted(found))[:40])}</td>'

    rows = "".join(
        f'<tr><td class="n">{event["version"]}</td><td class="n">{event["step"]}</td>'
        f"<td>{html.escape(event['kind'])}</td>"
        f'<td class="n">{event["total_bytes"]:,}</td><td class="n">{100 * event["density"]:.2f}</td>'
        f"<td><code>{html.escape(event['digest'][:32])}</code></td>"
        + "".join(cell(name, event["version"], event["digest"]) for name in names)
        + "</tr>"
        for event in picture.published
    )
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    return (
        '<section class="card wide"><h2>Digests</h2><p class="dim">The trainer\'s digest of each version, and whether '
        "each worker that ran it computed the same from its own weights; – means that it did not run that version.</p>"
        '<div class="scroll"><table><thead><tr><th class="n">version</th><th class="n">step</th><th>kind</th>'
        '<th class="n">bytes</th><th class="n">changed, %</th><th>trainer\'s digest (first half)</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )

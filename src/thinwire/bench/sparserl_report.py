"""The report of SparseRL: its first finding, tables, the leaderboard as JSON and as a page, figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from thinwire.bench.sparserl_results import SCHEMA
from thinwire.bench.sparserl_statistics import Comparison, bootstrap, cells_of, compare, difference, pairs_of
from thinwire.bench.sparserl_summary import METRICS, Summary
from thinwire.errors import MisuseError
from thinwire.lab.study.statistics import Estimate

__all__ = ["insert", "leaderboard", "markdown", "methods_of", "write_report"]

_BEGIN, _END = "<!-- sparserl: begin -->", "<!-- sparserl: end -->"
DENSE, RANDOM, ASPG = "dense", "random-mask", "aspg"

Row = dict[str, Any]


def methods_of(summaries: Sequence[Summary]) -> list[str]:
    """Methods, the one with the best mean score first."""
    names = dict.fromkeys(s["method"] for s in summaries)
    return sorted(names, key=lambda name: (-fmean(s["score"] for s in summaries if s["method"] == name), name))


def _models(summaries: Sequence[Summary]) -> list[str]:
    sizes = {s["model"]: s["total"] for s in summaries}
    return sorted(sizes, key=lambda model: (sizes[model], model))


def _mean(summaries: Sequence[Summary], metric: str) -> float | None:
    values = [s[metric] for s in summaries if s[metric] is not None]
    return fmean(values) if values else None


def _estimate(estimate: Estimate | None) -> Row | None:
    if estimate is None:
        return None
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high, "runs": estimate.count}


def leaderboard(summaries: Sequence[Summary]) -> Row:
    """The leaderboard: entries by model and method, the best mean score first, and the comparisons with dense training
    and the random mask.

    An entry has the mean of every metric, ``score_interval`` (bootstrap over seeds within tasks), the learning rate,
    runs and how many diverged, and paired differences ``against`` others. ``cells`` are the same by task.
    """
    entries, cells = [], []
    for model in _models(summaries):
        of_model = [s for s in summaries if s["model"] == model]
        for method in methods_of(of_model):
            runs = [s for s in of_model if s["method"] == method]
            by_task = [[s["score"] for s in runs if s["task"] == t] for t in dict.fromkeys(s["task"] for s in runs)]
            entries.append({
                "model": model, "method": method, "lr": sorted({s["lr"] for s in runs}), "runs": len(runs),
                "diverged": sum(s["status"] != "success" for s in runs),
                "score_interval": _estimate(bootstrap(by_task)), **{m: _mean(runs, m) for m in METRICS},
                "against": {
                    other: _estimate(difference(pairs_of(of_model, method, other)))
                    for other in (DENSE, RANDOM) if other != method
                },
            })  # fmt: skip
    for (model, task, method), runs in cells_of(summaries).items():
        of_cell = [s for s in summaries if s["model"] == model and s["task"] == task]
        cells.append({
            "model": model, "task": task, "method": method, "seeds": sorted(s["seed"] for s in runs),
            "diverged": sum(s["status"] != "success" for s in runs),
            "score_interval": _estimate(bootstrap([[s["score"] for s in runs]])),
            **{m: _mean(runs, m) for m in METRICS},
            "against": {
                other: _estimate(difference(pairs_of(of_cell, method, other)))
                for other in (DENSE, RANDOM) if other != method
            },
        })  # fmt: skip
    comparisons = [_comparison(found) for found in _comparisons(summaries)]
    return {
        "benchmark": "SparseRL", "schema": SCHEMA, "metrics": METRICS, "finding": finding(summaries),
        "comparisons": comparisons, "entries": entries, "cells": cells,
        "machine": summaries[0].get("machine"), "versions": summaries[0].get("versions"),
    }  # fmt: skip


def _comparisons(summaries: Sequence[Summary]) -> list[Comparison]:
    found = [
        compare(summaries, method, other)
        for other in (RANDOM, DENSE) for method in methods_of(summaries) if method != other
    ]  # fmt: skip
    return [comparison for comparison in found if comparison is not None]


def _comparison(found: Comparison) -> Row:
    student = [found.student.low, found.student.high] if found.student.count > 1 else None
    return {
        "method": found.method, "against": found.against, "verdict": found.verdict,
        "bootstrap": _estimate(found.bootstrap), "student": student,
    }  # fmt: skip


def _points(estimate: Estimate, unit: str = " points") -> str:
    return f"{100 * estimate.value:+.1f}{unit} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def finding(summaries: Sequence[Summary]) -> str:
    """What the benchmark was made to tell: whether choosing 1 % of the weights beats drawing them."""
    found = compare(summaries, ASPG, RANDOM)
    if found is None:
        return f"Not answered: {ASPG} and {RANDOM} were not run from the same starts."
    text = {
        "better": "ASPG's 1 % of the weights beats a random 1 %",
        "worse": "ASPG's 1 % of the weights is worse than a random 1 %",
        "undecided": "ASPG's 1 % of the weights is not shown to be better than a random 1 %",
    }[found.verdict]
    student = "of one seed Student's interval has no end"
    if found.student.count > 1:
        low, high = 100 * found.student.low, 100 * found.student.high
        student = f"Student's over {found.student.count} seeds {low:+.1f} to {high:+.1f}"
    return (
        f"{text}: paired difference of the held-out score {_points(found.bootstrap)}, 95 % bootstrap interval over "
        f"{found.bootstrap.count} pairs of runs; {student}."
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heading, ["---", *["---:"] * (len(heading) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    return (
        f"{value:,.0f} B"
        if value < 1 << 14
        else f"{value / 1024:,.0f} KiB"
        if value < 1 << 24
        else f"{value / 2**20:,.0f} MiB"
    )


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("score, %", lambda e: f"{_percent(e['score_interval']['mean'])} "
     f"({_percent(e['score_interval']['low'])} to {_percent(e['score_interval']['high'])})"),
    ("gain", lambda e: _percent(e["gain"])),
    ("to dense", lambda e: _against(e, DENSE)),
    ("to random 1 %", lambda e: _against(e, RANDOM)),
    ("forgets", lambda e: _percent(e["forgetting"])),
    ("sent a step", lambda e: _bytes(e["sync_bytes"])),
    ("changed, %", lambda e: _percent(e["changed"], 2)),
    ("null, %", lambda e: _percent(e["null"], 2)),
    ("optimiser", lambda e: _bytes(e["optimizer_bytes"])),
    ("trained", lambda e: f"{e['trainable']:,.0f}"),
    ("GFLOP", lambda e: f"{e['flops'] / 1e9:,.0f}"),
    ("s", lambda e: f"{e['seconds']:.1f}"),
    ("lr", lambda e: ", ".join(f"{lr:g}" for lr in e["lr"])),
)  # fmt: skip


def _against(entry: Row, other: str) -> str:
    found = entry["against"].get(other)
    if found is None:
        return ""
    return f"{100 * found['mean']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def entries_table(board: Row, model: str) -> str:
    """One line a method: means over tasks and seeds."""
    entries = [e for e in board["entries"] if e["model"] == model]
    lines = [[e["method"] + (f" ({e['diverged']} diverged)" if e["diverged"] else ""),
              *(column(e) for _, column in _COLUMNS)] for e in entries]  # fmt: skip
    return _table(["method", *(name for name, _ in _COLUMNS)], lines)


def tasks_table(board: Row, model: str) -> str:
    """Scores by task, with their intervals."""
    cells = [c for c in board["cells"] if c["model"] == model]
    tasks = sorted({c["task"] for c in cells})
    scores = {(c["method"], c["task"]): c["score_interval"] for c in cells}
    lines = []
    for method in [e["method"] for e in board["entries"] if e["model"] == model]:
        found = [scores.get((method, task)) for task in tasks]
        texts = [
            "" if s is None else f"{_percent(s['mean'])} ({_percent(s['low'])} to {_percent(s['high'])})" for s in found
        ]
        lines.append([method, *texts])
    return _table(["method", *tasks], lines)


def markdown(summaries: Sequence[Summary]) -> str:
    """The report: the finding first, how it was measured, then tables for each model."""
    board = leaderboard(summaries)
    seeds = len({s["seed"] for s in summaries})
    verdicts = "\n".join(
        f"* {c['method']} against {c['against']}: {c['verdict']}, {100 * c['bootstrap']['mean']:+.1f} points "
        f"({100 * c['bootstrap']['low']:+.1f} to {100 * c['bootstrap']['high']:+.1f}), "
        f"{c['bootstrap']['runs']} pairs of runs"
        for c in board["comparisons"]
    )  # fmt: skip
    parts = [
        f"**{board['finding']}**",
        f"{len(summaries)} runs: {', '.join(_models(summaries))}; {', '.join(sorted({s['task'] for s in summaries}))}; "
        f"{len(methods_of(summaries))} methods; {seeds} seeds. Scores are of sampled answers to problems that no "
        "training saw, of the bf16 weights that were published last. Intervals are 95 %, bootstrapped over seeds "
        "within tasks. Each method's learning rate was tuned on a seed of its own over a grid of its own, of equal "
        "size for all methods, unless the suite's file gives it. Methods by their mean score:",
        verdicts,
    ]
    for model in _models(summaries):
        parts += [f"### {model}", entries_table(board, model), tasks_table(board, model)]
    return "\n\n".join(parts) + "\n"


def insert(text: str, path: Path) -> None:
    """Put ``text`` between the two marks of a page, in place of what is there.

    Raises:
        MisuseError: the page has not both marks, in their order.
    """
    page = path.read_text()
    head, begin, rest = page.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not begin or not end:
        raise MisuseError(f"{path} has no {_BEGIN} with {_END} after it; put both where the report belongs")
    path.write_text(f"{head}{begin}\n\n{text}\n{end}{tail}")


def write_report(summaries: Sequence[Summary], out: Path) -> list[Path]:
    """``report.md``, ``leaderboard.json``, ``leaderboard.html``, and Pareto plots, into ``out``; the files written.

    Raises:
        MisuseError: Matplotlib is not installed.
    """
    from thinwire.bench.sparserl_figures import pareto_figures
    from thinwire.bench.sparserl_page import page

    out.mkdir(parents=True, exist_ok=True)
    board = leaderboard(summaries)
    figures = pareto_figures(board, out)
    texts = {
        "report.md": markdown(summaries), "leaderboard.json": json.dumps(board, indent=1, allow_nan=False) + "\n",
        "leaderboard.html": page(board),
    }  # fmt: skip
    for name, text in texts.items():
        (out / name).write_text(text)
    return [*(out / name for name in texts), *figures]

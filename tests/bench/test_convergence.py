"""Rates: feedback keeps the dense one, its absence stands still, and the page shows what the rows hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from thinwire.bench.cli import app
from thinwire.bench.convergence import METHODS, PROBLEMS, ConvergenceOptions, run_convergence
from thinwire.errors import MisuseError

ROOT = Path(__file__).resolve().parents[2]


def test_feedback_keeps_the_rate_and_its_absence_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PROBLEMS, "logistic")
    rows = run_convergence(ConvergenceOptions(horizons=(200, 800), seeds=1))
    dense, feedback, without = ({row["method"]: row for row in rows}[name] for name in METHODS)
    assert abs(feedback["slope"] - dense["slope"]) < 0.1
    assert dense["slope"] < -0.4
    never = float((PROBLEMS["quadratic"]().curvature[10:] ** 2).sum())  # of the cells that are never stepped
    assert never == pytest.approx(13.6, abs=0.05)
    assert min(without["squared_gradient"]) > never > feedback["squared_gradient"][-1]


@pytest.mark.parametrize("bad", [{"horizons": (5,)}, {"horizons": (1, 5)}, {"seeds": 0}, {"density": 1.0}])
def test_misuse_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        ConvergenceOptions(**bad)


def test_the_command_writes_rows(tmp_path: Path) -> None:
    words = ["convergence", "--horizons", "2,4", "--seeds", "1", "--out", str(tmp_path / "rows.jsonl")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(PROBLEMS) * len(METHODS)
    assert CliRunner().invoke(app, ["convergence", "--horizons", "x"]).exit_code != 0


def test_the_figures_in_the_docs_are_those_of_the_rows() -> None:
    text = (ROOT / "docs" / "theory.md").read_text()
    for line in (ROOT / "bench" / "results" / "convergence.jsonl").read_text().splitlines():
        row = json.loads(line)
        values = " | ".join(f"{value:.3g}" for value in row["squared_gradient"])
        assert f"| {row['problem']} | {row['method']} | {values} | {row['slope']:.2f} |" in text

"""``thinwire study``: what a person types, and what lies in the folder afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.tools import thinwire

SMALL = {
    "centre": {"size": "small", "task": "sort_digits", "steps": 8, "objective": "pretrain"}, "seeds": [0, 1],
    "sizes": {"small": {"hidden": 64, "layers": 1}}, "tasks": {"sort_digits": {"length": 2}},
    "vary": [{"lr": ["low", "high"]}],
}  # fmt: skip


def test_a_study_leaves_a_table_figures_findings_and_a_page(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(json.dumps(SMALL))
    words = ["study", "sparsity", "-c", tmp_path / "s.yaml", "-o", tmp_path / "out", "-j", "1"]
    listed = thinwire(*words, "--list", "--json").json["runs"]
    assert [run["done"] for run in listed] == [False] * 4
    assert "leave --report-only out" in thinwire(*words, "--report-only", code=2).err
    found = thinwire(*words, "--json").json
    assert (found["runs"], found["failed"]) == (4, 0)
    names = {"runs.parquet", "summaries.jsonl", "findings.md", "report.html", "figures", "runs"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    again = thinwire(*words)
    assert "4 runs" in again.out
    assert "to make" not in again.err  # nothing was left
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "out" / "runs.parquet")
    assert table.num_rows == found["rows"]
    assert {"objective", "lr_value", "step", "lag", "kind", "changed", "null"} <= set(table.column_names)
    (tmp_path / "s.yaml").write_text("centr: {}")
    assert "did you mean centre" in thinwire(*words, code=2).err


def test_sharpness_shows_every_smoothing_beside_plain_advantages(tmp_path: Path) -> None:
    found = thinwire("study", "sharpness", "--seeds", "1", "--steps", "1", "-o", tmp_path / "rows.jsonl", "--json").json
    assert found["lines"][0]["smoothing"] == "none"
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(found["lines"])
    assert "adamw or descent" in thinwire("study", "sharpness", "--optimiser", "adam", code=2).err


@pytest.mark.slow
def test_prediction_finds_the_boundary_better_than_chance(tmp_path: Path) -> None:
    rows = thinwire("study", "prediction", "--steps", "8", "-o", tmp_path / "rows.jsonl", "--json").json["rows"]
    by = {(row["setting"], row["predictor"]): row for row in rows}
    later = by["later steps", "boundary"]
    assert later["average_precision"] > 5 * later["base_rate"]
    assert by["other seed", "mlp"]["average_precision"] > by["other seed", "last step"]["average_precision"]
    assert "8 steps or more" in thinwire("study", "prediction", "--steps", "8", "--lr", "0", code=2).err

"""The benchmark of merging compares before it times, and its rows hold what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from thinwire.bench import merge
from thinwire.bench.merge import MergeOptions, run_merge
from thinwire.bench.merge_cli import merge_table

SMALL = MergeOptions(numel=200_000, tasks=3, methods=("task_arithmetic", "ties"), repeats=1)


def test_rows_hold_what_was_measured(tmp_path: Path) -> None:
    rows = run_merge(SMALL, report=lambda text: None, folder=tmp_path)
    assert [row["method"] for row in rows] == ["task_arithmetic", "ties"]
    for row in rows:
        assert row["times_faster"] == row["best_s"]["dense"] / row["best_s"]["sparse"]
        assert row["same_bits"] > 0.97
    assert rows[0]["same_bits"] == 1
    assert 1 < rows[0]["bytes_per_changed"]["ulp"] < rows[0]["bytes_per_changed"]["absolute"] < 3.5
    assert merge_table(rows).row_count == 2
    assert not list(tmp_path.iterdir())


def test_nothing_is_timed_that_merges_wrongly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(merge, "_sparse", lambda base, patches, recipe: iter(()))
    with pytest.raises(AssertionError, match="only 0"):
        run_merge(SMALL, report=lambda text: None, folder=tmp_path)

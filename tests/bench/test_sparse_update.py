"""The benchmark of sparse steps verifies before it times, and its rows hold what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from thinwire.bench.cli import app
from thinwire.bench.sparse_update import SparseUpdateOptions, run_sparse_update
from thinwire.errors import MisuseError
from thinwire.optim import kernels

SMALL = SparseUpdateOptions(numel=20_000, densities=(0.01, 0.1), threads=1, repeats=3)


def test_a_row_holds_what_was_measured() -> None:
    for row, density in zip(run_sparse_update(SMALL), SMALL.densities, strict=True):
        assert row["verified"]
        assert row["active"] == round(20_000 * density)
        assert row["state_bytes"] <= 2 * density * row["dense_state_bytes"]
        for kind in ("best", "median"):
            s = row[f"{kind}_s"]
            amortised = s["step"] + (s["refresh"] - s["step"]) / 100
            assert row["amortised_s"][kind] == pytest.approx(amortised, abs=1e-6)
            assert row["times_faster"][kind] == pytest.approx(s["dense"] / amortised, rel=0.01, abs=0.01)


def test_nothing_is_timed_that_steps_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.adam

    def off(weights: torch.Tensor, *rest: Any) -> None:
        real(weights, *rest)
        weights[0] += 1

    monkeypatch.setattr(kernels, "adam", off)
    with pytest.raises(AssertionError, match="nothing was timed"):
        run_sparse_update(SMALL)


@pytest.mark.parametrize("bad", [{"numel": 10}, {"densities": ()}, {"densities": (1.0,)}, {"repeats": 0}])
def test_misuse_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        SparseUpdateOptions(**bad)


def test_the_command_writes_rows(tmp_path: Path) -> None:
    words = ["sparse-update", "--numel", "5000", "--densities", "0.05", "--threads", "1", "--repeats", "1", "--out"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "rows.jsonl")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "rows.jsonl").read_text())["active"] == 250


def test_the_figures_in_the_docs_are_those_of_the_rows() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "optim.md").read_text()
    for line in (root / "bench" / "results" / "sparse-update-100m.jsonl").read_text().splitlines():
        row = json.loads(line)
        times = [
            f"{1000 * row['best_s'][n]:.3g} ({1000 * row['median_s'][n]:.3g})" for n in ("dense", "step", "refresh")
        ]
        faster = f"{row['times_faster']['best']:.1f} ({row['times_faster']['median']:.1f})"
        assert " | ".join([f"| {row['density']:.1%}", *times, faster]) in text

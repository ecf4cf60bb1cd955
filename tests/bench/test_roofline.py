"""Roofline and predictive backward: rows hold what was measured, pages hold what the rows do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from thinwire.bench.cli import app
from thinwire.bench.predictive import PredictiveOptions, run_predictive
from thinwire.bench.roofline import RooflineOptions, cost, run_roofline
from thinwire.bench.roofline_figure import roofline_figure
from thinwire.errors import MisuseError

ROOT = Path(__file__).resolve().parents[2]


def kept(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "bench" / "results" / name).read_text().splitlines()]


@given(st.floats(0.001, 0.5), st.integers(0, 2**32))
def test_the_lines_counted_are_those_of_random_positions(density: float, seed: int) -> None:
    n = 160_000
    at = np.flatnonzero(np.random.default_rng(seed).random(n) < density)
    lines, counted = len(np.unique(at // 16)), cost(n, density)
    assert lines == pytest.approx(counted["lines"], abs=6 * counted["lines"] ** 0.5 + 5)


def test_a_roofline_has_its_rows_and_its_picture(tmp_path: Path) -> None:
    rows = run_roofline(RooflineOptions(numel=200_000, densities=(0.01, 0.1), repeats=1))
    assert [row["kind"] for row in rows] == ["dense", "sparse", "sparse"]
    for row in rows:
        assert min(row["step_s"], row["bound_s"], row["bytes"], row["operations"], row["stream_gbps"]) > 0
    assert rows[1]["bytes"] == pytest.approx(sum(cost(200_000, 0.01)[k] for k in ("line_bytes", "stream_bytes")))
    roofline_figure(rows, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000
    words = ["roofline", "--numel", "5000", "--densities", "0.1", "--repeats", "1", "--out", str(tmp_path / "r.jsonl")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


def test_predictive_backward_does_less(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    rows = {row["method"]: row for row in run_predictive(PredictiveOptions(layers=8, width=64, batch=16, repeats=1))}
    assert torch.get_num_threads() == before
    for name in ("row", "module"):
        assert rows[name]["flops"] < 0.6 * rows["dense"]["flops"]
        assert rows[name]["kept_bytes"] < rows["dense"]["kept_bytes"]
    words = ["predictive", "--width", "8", "--batch", "4", "--repeats", "1", "--out", str(tmp_path / "rows.jsonl")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "make", [lambda: RooflineOptions(numel=1), lambda: RooflineOptions(densities=()), lambda: PredictiveOptions(rows=0)]
)
def test_misuse_is_refused(make: Any) -> None:
    with pytest.raises(MisuseError):
        make()


def test_the_figures_in_the_docs_are_those_of_the_rows() -> None:
    hardware, optim = ((ROOT / "docs" / name).read_text() for name in ("hardware.md", "optim.md"))
    for row in kept("roofline.jsonl"):
        name = "1 (AdamW, fused)" if row["kind"] == "dense" else f"{row['density']:.1%}"
        cells = (
            f"{row.get('lines_gbps', row['stream_gbps']):.1f}", f"{1000 * row['step_s']:.2f}",
            f"{1000 * row['bound_s']:.2f}", f"{1000 * row.get('ideal_s', row['bound_s']):.2f}",
        )  # fmt: skip
        assert f"| {name} | {row['bytes'] / 1e9:.3g} | {' | '.join(cells)} |" in hardware
    for row in kept("predictive.jsonl"):
        times = f"{1000 * row['best_s']:.0f} ({1000 * row['median_s']:.0f})"
        assert f"| {row['method']} | {row['flops'] / 1e9:.2f} | {times} | {row['kept_bytes'] / 1e6:.1f} |" in optim

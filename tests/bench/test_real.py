"""The benchmark of a real trainer, fed by a simulated one."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from thinwire.bench import real
from thinwire.bench.cli import app
from thinwire.bench.real import LEVELS, run_real, summary
from thinwire.bench.workloads import adam_versions
from thinwire.errors import MisuseError


def test_every_version_is_exact_and_has_its_row(tmp_path: Path) -> None:
    states = islice(adam_versions(1 << 20, 3e-6, seed=2), 4)
    rows = run_real(states, tmp_path, source="simulated Adam")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert all(row["thinwire"][level]["exact"] for level in LEVELS)
        sizes = {name: found["bytes_per_changed"] for name, found in row["peers"].items()}
        assert sizes["COO"] == 6
        assert row["thinwire"]["smallest"]["bytes_per_changed"] < row["thinwire"]["small"]["bytes_per_changed"] < 2
        assert sum(changed for _, _, changed in row["changes"]["by_exponent"]) == row["changed"]
        assert sum(every for _, every, _ in row["changes"]["by_exponent"]) == row["elements"]
        json.dumps(row)
    total = summary(rows)
    assert total["exact"] is True
    assert total["share_of_full_checkpoints"]["smallest"] < total["share_of_full_checkpoints"]["small"] < 1


def test_a_step_without_changes_has_no_bytes_per_change(tmp_path: Path) -> None:
    still = {"w": torch.ones(4096, dtype=torch.bfloat16)}
    rows = run_real(iter([still, still]), tmp_path, source="still")
    assert rows[0]["changed"] == 0
    assert rows[0]["thinwire"]["small"]["bytes_per_changed"] is None
    assert summary(rows)["bytes_per_changed"] == {}


def test_other_data_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="bf16"):
        run_real(iter([{"w": torch.ones(4)}]), tmp_path, source="fp32")


def test_a_version_that_is_not_exact_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = real._Lane.follow

    def careless(lane: real._Lane) -> object:
        result = follow(lane)
        next(iter(lane.model.values())).view(torch.int16).view(-1)[0] ^= 1
        return result

    monkeypatch.setattr(real._Lane, "follow", careless)
    rows = run_real(islice(adam_versions(1 << 16, 3e-6, seed=2), 2), tmp_path, source="simulated Adam")
    assert summary(rows)["exact"] is False


def test_the_command_writes_rows_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    out = tmp_path / "rows.jsonl"
    args = ["real", "--simulated", "--steps", "2", "--lr", "2e-6", "--out", str(out), "--figures", str(tmp_path)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert len(out.read_text().splitlines()) == 2
    assert (tmp_path / "real.png").stat().st_size > 10_000
    assert (tmp_path / "real.html").stat().st_size > 10_000

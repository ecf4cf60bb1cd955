"""The benchmark of selection verifies before it times, and starts where only torch is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from thinwire.bench import selection
from thinwire.bench.selection import DISTRIBUTIONS, SelectionOptions, run_selection
from thinwire.bench.selection_cli import selection as command
from thinwire.errors import MisuseError
from thinwire.tensors.select import Selection

SMALL = SelectionOptions(numels=(100_000,), densities=(0.01,), repeats=2)


def test_a_row_holds_what_was_measured() -> None:
    rows = run_selection(SMALL)
    assert [(row["distribution"], row["threads"]) for row in rows] == [(d, t) for d in DISTRIBUTIONS for t in (1, 2)]
    for row in rows:
        assert row["verified"]
        assert (row["numel"], row["k"], row["runs"]) == (100_000, 1000, 2)
        assert ("numpy.argpartition" in row["best_s"]) == (row["threads"] == 1)
        for name, ratio in row["times_faster"].items():
            peer = row["best_s"][selection.PEER[name]]
            assert ratio == pytest.approx(peer / row["best_s"][name], rel=0.05, abs=0.02)
        assert all(row["median_s"][name] >= best > 0 for name, best in row["best_s"].items())


def test_nothing_is_timed_that_selects_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(x: torch.Tensor, k: int, **_: object) -> Selection:
        return Selection(torch.arange(k, dtype=torch.int32), 1.0, True)

    monkeypatch.setattr(selection, "top_k", off_by_one)
    with pytest.raises(AssertionError, match="differs"):
        run_selection(SMALL)


@pytest.mark.parametrize("bad", [{"distributions": ("flat",)}, {"densities": (0.0,)}, {"repeats": 0}, {"threads": ()}])
def test_misuse_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(MisuseError):
        SelectionOptions(**bad)  # type: ignore[arg-type]


def test_heavy_tails_are_heavy() -> None:
    random = torch.Generator().manual_seed(0)
    largest = {name: float(make(200_000, random, "cpu").abs().max()) for name, make in DISTRIBUTIONS.items()}
    assert largest["normal"] < 7 < 50 < largest["heavy"]


def test_the_module_runs_by_itself(tmp_path: Path) -> None:
    options = ["--numel", "20000", "--density", "0.01", "--distribution", "heavy", "--threads", "1", "--repeats", "1"]
    line = [sys.executable, "-m", "thinwire.bench.selection", *options, "--json", "--out", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == json.loads((tmp_path / "rows.jsonl").read_text())
    assert json.loads(done.stdout)["machine"]["cores"] >= 1


def test_it_starts_without_numba_typer_or_rich() -> None:
    """As on a machine that is borrowed for its GPU."""
    code = (
        "import sys\n"
        "for name in ('numba', 'llvmlite', 'typer', 'rich', 'blake3', 'zstandard', 'obstore', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import thinwire.bench.selection, thinwire.tensors.select_torch\n"
        "from importlib.util import find_spec\n"
        "if find_spec('triton'): import thinwire.tensors.select_triton\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def test_the_command_shows_a_table_and_prints_rows() -> None:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["--numel", "20000", "--repeats", "1", "--json"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 2 * 2 * len(DISTRIBUTIONS)
    assert "torch.topk" in done.output

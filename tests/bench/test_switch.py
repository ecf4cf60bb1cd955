"""The benchmark of switching verifies before it times; its figures in the docs are those of its row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from thinwire.bench import switch as module
from thinwire.bench.switch import RATIOS, SwitchOptions, run_switch
from thinwire.bench.switch_cli import switch as command
from thinwire.bench.switch_cli import switch_markdown
from thinwire.errors import MisuseError

ROOT = Path(__file__).resolve().parents[2]
TINY = SwitchOptions(size="tiny", switches=10, repeats=2)


@pytest.fixture
def _peers() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")


@pytest.mark.usefixtures("_peers")
def test_a_row_holds_what_was_measured(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    out = tmp_path / "rows.jsonl"
    options = ["--size", "tiny", "--switches", "10", "--repeats", "2", "--json", "--out", str(out)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert json.loads(done.stdout.splitlines()[-1]) == row
    assert (row["runs"], row["switches"], row["digests_equal"]) == (2, 10, 10)
    assert 0.9 < row["changed"] / (row["density"] * row["weights"]) <= 1
    assert row["task_memory_bytes"] == row["changed"] * (4 + 2 + 2)
    assert all(row["median_s"][name] >= best > 0 for name, best in row["best_s"].items())
    assert set(row["times_faster"]) == set(RATIOS)
    assert row["lora"]["wrong_share_at_end"] >= row["lora"]["wrong_share_after_one"] > 0
    assert 0 < row["arithmetic"]["base_wrong_share"] < 1
    assert switch_markdown(row).count("\n") == 8


@pytest.mark.usefixtures("_peers")
def test_nothing_is_timed_that_restores_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinwire.integrations.overlay.advance", lambda *args, **options: None)
    with pytest.raises(AssertionError, match="promises"):
        run_switch(TINY)


@pytest.mark.parametrize("bad", [{"size": "7b"}, {"density": 0.0}, {"density": 1.5}, {"rank": 0}, {"repeats": 0}])
def test_misuse_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(MisuseError):
        SwitchOptions(**bad)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_peers")
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(MisuseError, match="transformers is not installed"):
        run_switch(TINY)


def test_the_figures_in_the_docs_are_those_of_the_row() -> None:
    (row,) = [json.loads(line) for line in (ROOT / "bench" / "results" / "switch-0.5b.jsonl").read_text().splitlines()]
    docs = (ROOT / "docs" / "switching.md").read_text()
    assert switch_markdown(row) in docs
    figures = [row["lora"]["wrong_share_after_one"], row["lora"]["wrong_share_at_end"]]
    for share in [*figures, row["arithmetic"]["base_wrong_share"], row["arithmetic"]["task_wrong_share"]]:
        assert f"{100 * share:.1f} %" in docs
    for text in (f"{row['weights'] / 1e6:.0f} M", f"{row['changed'] / 1e6:.2f} M", f"{row['load_s']:.1f} s"):
        assert text in docs
    assert row["digests_equal"] * 100 == row["switches"] == 1000

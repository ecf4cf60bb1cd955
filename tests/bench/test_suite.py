"""The suite trains, merges and routes; the router is each expert on its own task, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from thinwire.bench import suite as module
from thinwire.bench.suite import TASKS, SuiteOptions
from thinwire.bench.suite_cli import merge_suite, suite_markdown
from thinwire.errors import MisuseError

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    "--base-steps",
    "5",
    "--expert-steps",
    "5",
    "--seeds",
    "2",
    "--method",
    "ties",
    "--method",
    "linear",
    "--json",
]


def test_the_command_compares_experts_merges_and_the_router(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(merge_suite)
    out = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(app, [*OPTIONS, "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {row["model"]: row["tasks"] for row in rows}
    assert list(found) == ["base", *(f"expert: {task}" for task in TASKS), "router", "ties", "linear"]
    for task in TASKS:
        assert found["router"][task] == found[f"expert: {task}"][task]
    assert suite_markdown(rows).count("\n") == 1 + len(rows)


def test_an_expert_moves_the_share_of_weights_it_may() -> None:
    generator = torch.Generator().manual_seed(0)
    data, model = module._data(generator), module._Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module._train(model, data.of(0, False), 3, generator, 0.1)
    moved = sum(int((tensor != before[name]).sum()) for name, tensor in model.state_dict().items())
    assert 0.02 < moved / sum(tensor.numel() for tensor in before.values()) <= 0.11


def test_no_pair_is_both_trained_on_and_shown() -> None:
    data = module._data(torch.Generator().manual_seed(0))
    seen, shown = (set(map(tuple, data.of(None, held)[0].tolist())) for held in (False, True))
    assert not seen & shown
    assert len(seen) + len(shown) == 24 * 24 * len(TASKS)


@pytest.mark.parametrize("bad", [{"seeds": ()}, {"base_steps": 0}, {"density": 0.0}, {"methods": ("tise",)}])
def test_misuse_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(MisuseError):
        SuiteOptions(**bad)  # type: ignore[arg-type]


def test_the_table_in_the_docs_is_that_of_the_rows() -> None:
    rows = [json.loads(line) for line in (ROOT / "bench" / "results" / "merge-suite.jsonl").read_text().splitlines()]
    assert suite_markdown(rows) in (ROOT / "docs" / "switching.md").read_text()
    assert {row["model"] for row in rows} >= {"base", "router", "ties"}

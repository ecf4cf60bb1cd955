"""The benchmark of skip deltas: its sums add up, its simulation is the planner's, its figure is drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.cli.tools import thinwire
from thinwire.bench.skips import fit, run_skips, simulate
from thinwire.bench.skips_cli import skips_figure, skips_markdown, skips_table
from thinwire.errors import MisuseError


def states(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(200_000, generator=generator).bfloat16()
    often = torch.rand(200_000, generator=generator) < 0.02
    found = []
    for _ in range(count):
        found.append({"w": state.clone()})
        state[often & (torch.rand(200_000, generator=generator) < 0.7)] *= 1.01
    return found


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    return run_skips(states(13), source="test")


def test_rows_say_what_the_planner_finds(rows: list[dict[str, object]]) -> None:
    for ladder in ("ladder", "dense"):
        behind = [row for row in rows if row["kind"] == "behind" and row["ladder"] == ladder]
        assert [row["behind"] for row in behind] == list(range(1, 13))
        assert [row["places"] for row in behind] == list(range(12, 0, -1))
        for row in behind:
            assert row["share_best"] <= row["share_median"] <= row["share_worst"] <= 1 + 1e-9  # type: ignore[operator]
    spans = {(row["ladder"], row["span"]): row["count"] for row in rows if row["kind"] == "rung"}
    assert spans["ladder", 1] == 12
    assert spans["ladder", 4] == 2  # 4 -> 8, 8 -> 12
    assert spans["dense", 8] == 5
    followed = [row for row in rows if row["kind"] == "followed"]
    assert followed
    for row in followed:
        assert row["digest_equal"]
        assert row["ladder_patch_bytes"] <= row["replay_patch_bytes"]  # type: ignore[operator]


def test_long_chains_are_simulated_and_say_so(rows: list[dict[str, object]], tmp_path: Path) -> None:
    more = simulate(rows, 200)
    assert all(row["simulated"] for row in more)
    law = fit(rows)
    assert law["held_out_span"] == 8 or law["held_out_span"] == 4
    for row in more[1:]:
        assert row["hops_max"] <= max(1, 2 * math.floor(math.log2(row["behind"])))
        assert row["ladder_bytes"] <= row["replay_bytes"]
    skips_figure([*rows, *more], tmp_path / "skips.png")
    assert (tmp_path / "skips.png").stat().st_size > 10_000
    assert skips_table([*rows, *more]).row_count == 4  # 1, 2, 4, 8
    assert skips_markdown(rows).count("\n") == 5


def test_too_short_a_chain_is_misuse() -> None:
    with pytest.raises(MisuseError, match="four"):
        run_skips(states(3), source="test")
    with pytest.raises(MisuseError, match="power law"):
        fit([])


def test_the_command_writes_rows_and_simulates_anew_from_them(tmp_path: Path) -> None:
    rows = run_skips(states(9), source="test")
    kept = tmp_path / "rows.jsonl"
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    thinwire("bench", "skips", "--again", kept, "--longest", 100, "--out", out, "--figures", tmp_path)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row for row in again if not row["simulated"]] == json.loads(json.dumps(rows))
    assert (tmp_path / "skips.png").exists()
    thinwire("bench", "skips", "--model", "huge", code=2)


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_the_figures_in_the_docs_are_those_of_the_rows(name: str) -> None:
    kept = [json.loads(line) for line in (ROOT / "bench" / "results" / f"skips-{name}.jsonl").read_text().splitlines()]
    text = (ROOT / "docs" / "skips.md").read_text()
    assert name == "nano" or skips_markdown(kept) in text
    assert all(row["digest_equal"] for row in kept if row["kind"] == "followed")
    for ladder in ("ladder", "dense"):
        (row,) = [r for r in kept if r["kind"] == "behind" and r["ladder"] == ladder and r["behind"] == 32]
        assert f"1/{1 / row['share_worst']:.1f}" in text

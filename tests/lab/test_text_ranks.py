"""Two ranks over gloo: same weights, the harm of one spoilt worker, and runs that go on bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lab.text_ranks import STALE
from thinwire.lab.runlog import read_rows
from thinwire.lab.text.recipe import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks have left their findings."""
    folder = tmp_path_factory.mktemp("text-ranks")
    script = Path(__file__).with_name("text_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(folder)], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def first_losses(folder: Path, name: str) -> tuple[float, float]:
    """Both workers' losses in the first step, in which all weights are still the same."""
    rows = [row for row in read_rows(folder / name / "metrics.jsonl") if row["kind"] == "workers"]
    assert {(row["weight_0"], row["weight_1"]) for row in rows} == {(0.5, 0.5)}
    return rows[0]["loss_0"], rows[0]["loss_1"]


def test_all_ranks_end_with_the_same_weights_losses_and_words(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first.keys() == second.keys()
    for name in first.keys() - {"unlike"}:
        for what in ("digest", "sample", "losses", "corrupted"):
            assert first[name][what] == second[name][what], name
        assert len(first[name]["sample"]) == 30


def test_a_stopped_run_goes_on_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    """With top-k, error feedback, a falling density, dropout, and one worker whose gradients are old."""
    for found in ranks:
        assert [found[f"stale until {stop}"]["finished"] for stop in (3, 19, None)] == [False, False, True]
        assert found["stale until None"] == found["stale"]
        assert found["stale"]["corrupted"] == [1]
        assert found["stale"]["received"] < 0.5 * found["stale"]["dense"]


def test_what_is_wrong_with_one_worker_leaves_the_data_of_the_other_as_it_was(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    clean = first_losses(folder, "iid")
    for kind in ("token_swap", "label_noise"):
        good, bad = first_losses(folder, kind)
        assert good == clean[0]
        assert bad != clean[1]
    for kind in ("duplicated_batch", "sign_flip"):  # begin as the others do
        assert first_losses(folder, kind) == clean
    assert len({ranks[0][name]["digest"] for name in ("iid", "token_swap", "label_noise", "duplicated_batch",
                                                      "sign_flip")}) == 5  # fmt: skip


def test_a_spoilt_worker_drags_the_mean(ranks: list[dict[str, Any]]) -> None:
    clean = ranks[0]["dense"]["losses"][-1][1]
    assert ranks[0]["iid"]["losses"][-1][1] == clean  # corrupted by nothing
    for kind in ("token_swap", "label_noise", "sign_flip"):
        assert ranks[0][kind]["losses"][-1][1] > clean + 0.03, kind


def test_a_density_of_one_is_the_dense_mean(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["all sent"]["losses"][0] == pytest.approx(ranks[0]["dense"]["losses"][0], rel=1e-3)


def test_ranks_with_unlike_texts_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("have read different texts" in found["unlike"] for found in ranks)


def test_another_number_of_workers_goes_on_from_the_checkpoint(folder: Path, ranks: list[dict[str, Any]]) -> None:
    newest = max((folder / "run" / "checkpoints").iterdir())
    assert train(replace(STALE, resume=str(newest))).digest == ranks[0]["stale"]["digest"]  # all was done
    longer = train(replace(STALE, resume=str(newest), epochs=3))
    assert (longer.workers, longer.steps, longer.finished, longer.corrupted) == (1, 81, True, (0,))
    assert longer.history[-1].valid_loss < ranks[0]["stale"]["losses"][-1][1]

"""Two ranks over gloo: they end with the same weights, and a run that is stopped goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lab.vision_ranks import TOPK
from thinwire.lab.runlog import read_rows
from thinwire.lab.trainer.options import COMPRESSORS
from thinwire.lab.vision.recipe import train

pytestmark = pytest.mark.slow  # test_text_ranks does most of this with smaller models

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks have left their findings."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("vision_ranks.py")
    done = subprocess.run(
        [*TORCHRUN, str(script), str(folder)], env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_all_ranks_end_with_the_same_weights_whatever_is_sent(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first.keys() == second.keys()
    for name in first.keys() - {"unlike"}:
        assert first[name]["digest"] == second[name]["digest"], name
        assert first[name]["accuracy"] == second[name]["accuracy"], name


def test_a_stopped_run_goes_on_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    """With top-k, error feedback, momentum correction, a falling density and dropout."""
    for found in ranks:
        assert [found[f"topk until {stop}"]["finished"] for stop in (5, 33, None)] == [False, False, True]
        assert found["topk until None"] == found["topk"]
        assert found["topk until 33"]["digest"] != found["topk"]["digest"]


def test_a_stopped_run_with_batch_norm_and_plain_ddp_goes_on_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["norms until None"] == found["norms"]


def test_compression_is_told_in_bytes_and_learns(folder: Path, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["topk"]["received"] < 0.3 * found["topk"]["dense"]  # 5 %, after a warm-up from 25 %
        assert found["topk"]["losses"][-1] < 1.9 < found["topk"]["losses"][0]
    rows = [row for row in read_rows(folder / "run" / "metrics.jsonl") if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(1, 81))
    densities = [row["density"] for row in rows]
    assert densities[0] == 0.25
    assert densities == sorted(densities, reverse=True)
    assert densities[8:] == [0.05] * 72
    assert sum(row["bytes_received"] for row in rows) == ranks[0]["topk"]["received"]
    assert sum(row["bytes_dense"] for row in rows) == ranks[0]["topk"]["dense"]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_trains(ranks: list[dict[str, Any]], name: str) -> None:
    found = ranks[0][name + " short"]
    assert (found["steps"], found["finished"]) == (4, True)
    assert found["dense"] > 0
    others = [ranks[0][other + " short"]["digest"] for other in COMPRESSORS if other != name]
    assert found["digest"] not in others or name in ("topk", "threshold", "none", "randomk", "blocktopk")


def test_a_density_of_one_is_the_dense_mean(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["all sent"]["losses"] == pytest.approx(ranks[0]["dense"]["losses"], rel=1e-4)


def test_scaled_losses_of_half_precision_leave_the_residuals_in_true_units(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["scaled"]["losses"] == pytest.approx(ranks[0]["topk short"]["losses"], rel=0.02)


def test_a_batch_in_parts_is_the_batch_and_is_exchanged_once(ranks: list[dict[str, Any]]) -> None:
    whole, parts = ranks[0]["whole"], ranks[0]["in parts"]
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert parts["received"] == whole["received"]


def test_ranks_with_unlike_options_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("given different compressors" in found["unlike"] for found in ranks)


def test_another_number_of_workers_goes_on_from_the_checkpoint(folder: Path, ranks: list[dict[str, Any]]) -> None:
    newest = max((folder / "run" / "checkpoints").iterdir())
    assert train(replace(TOPK, resume=str(newest))).digest == ranks[0]["topk"]["digest"]  # all was done: nothing moves
    longer = train(replace(TOPK, resume=str(newest), epochs=6))
    assert (longer.workers, longer.steps, longer.finished) == (1, 240, True)
    assert longer.history[-1].train_loss < ranks[0]["topk"]["losses"][-1]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thinwire", "train", "vision", "--workers", "2", "--compress", "topk", "--mode",
               "split", "--epochs", "12", "--checkpoint-every", "7", "--resume", "auto", "--json", "--out"]  # fmt: skip

    def finish(out: Path) -> dict[str, Any]:
        done = subprocess.run([*command, str(out)], env=environment(), capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    whole = finish(tmp_path / "whole")
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment(), start_new_session=True)
    while not list((tmp_path / "killed").glob("checkpoints/step-00000014")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    again = finish(tmp_path / "killed")
    assert again["digest"] == whole["digest"]
    assert again["bytes_received"] == whole["bytes_received"]
    names = ("epoch", "step", "train_loss", "test_loss", "accuracy")
    assert [[row[x] for x in names] for row in again["history"]] == [
        [row[x] for x in names] for row in whole["history"]
    ]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]

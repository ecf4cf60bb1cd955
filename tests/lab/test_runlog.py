"""Logs: every row reaches every sink, and a run that goes on leaves no row twice."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from thinwire.errors import MisuseError
from thinwire.lab.progress import RunProgress
from thinwire.lab.runlog import JsonLines, open_log, read_rows


def test_rows_are_json_whatever_the_values(tmp_path: Path) -> None:
    with open_log(["jsonl"], tmp_path, run="r", config={}) as log:
        log.write("step", 1, loss=float("nan"), lr=0.1, name="é\n")
        log.write("round", 2, accuracy=1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in lines]
    assert strict == [
        {"kind": "step", "step": 1, "loss": None, "lr": 0.1, "name": "é\n"},
        {"kind": "round", "step": 2, "accuracy": 1},
    ]
    assert read_rows(tmp_path / "metrics.jsonl") == strict


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in range(1, 6):
        log.write("step", step, {"loss": step})
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')  # killed within a line
    again = JsonLines(path, after=3)
    again.write("step", 4, {"loss": 40})
    again.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(["tensorboard"], tmp_path, run="r", config={}) as log:
        for step in (1, 2):
            log.write("step", step, loss=1 / step, note="a text")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["step/loss"]
    assert [(x.step, x.value) for x in events.Scalars("step/loss")] == [(1, 1.0), (2, 0.5)]


def test_wandb_keeps_an_offline_run(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from thinwire.lab.runlog import open_log\n"
        "with open_log(['wandb'], Path('.'), run='r', config={'lr': 0.1}) as log: log.write('step', 1, loss=0.5)"
    )
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=120)
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"step/loss" in kept.read_bytes()


def test_an_unknown_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="there are jsonl, tensorboard, wandb"):
        open_log(["csv"], tmp_path, run="r", config={})


def test_progress_is_a_bar_on_a_terminal_a_line_now_and_then_elsewhere_and_nothing_without_a_console() -> None:
    def shown(terminal: bool) -> str:
        stream = io.StringIO()
        with RunProgress(Console(file=stream, force_terminal=terminal, width=90), steps=4, every=2) as progress:
            for step in range(1, 5):
                progress.step(step, f"loss {step}.5")
            progress.say("epoch [1] done")
        return stream.getvalue()

    assert shown(False) == "step 2/4  loss 2.5\nstep 4/4  loss 4.5\nepoch [1] done\n"
    assert "4/4" in shown(True)
    assert "epoch [1] done" in shown(True)
    with RunProgress(None, steps=4, every=1) as silent:
        silent.step(1, "x")
        silent.say("y")

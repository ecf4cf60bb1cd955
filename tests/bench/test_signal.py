"""The signal benchmark: its runs are real and repeat themselves, its figures follow from its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from thinwire.aggregate import SIGNALS
from thinwire.bench.cli import app
from thinwire.bench.signal import SCENARIOS, SignalOptions, methods_for, plan, run_all, run_signal
from thinwire.bench.signal_report import interval, signal_figure, signal_markdown, summarise
from thinwire.errors import MisuseError

TINY = SignalOptions(data="grammar", layers=1, width=16, heads=2, context=16, batch=4, steps=40, valid_tokens=2048,
                     decay=0.8, warmup=12, rate=0.02)  # fmt: skip


def test_a_corrupted_worker_loses_its_weight_and_the_oracle_never_asks_it() -> None:
    weighted = run_signal(replace(TINY, scenario="swap100-1of2", method="loss_ema", steps=200, decay=0.9, warmup=20))
    assert weighted["weights"][0] == [0.5, 0.5]
    assert weighted["weights"][-1][0] > 0.9
    assert weighted["lowest_good"] == 1.0
    oracle = run_signal(replace(TINY, scenario="swap100-1of2", method="oracle"))
    assert oracle["weights"] == [[1.0, 0.0]] * 20
    assert oracle["loss"] < oracle["losses"][0]


def test_a_run_repeats_itself() -> None:
    options = replace(TINY, scenario="stale-2of8", method="agreement", steps=20)
    first, second = run_signal(options), run_signal(options)
    assert first["losses"] == second["losses"]
    assert first["losses"] != run_signal(replace(options, seed=1))["losses"]


@pytest.mark.parametrize("method", [*SIGNALS, "median", "adacons", "loss_ema+agreement"])
def test_every_method_trains(method: str) -> None:
    row = run_signal(replace(TINY, scenario="flip-2of8", method=method, steps=24))
    assert row["losses"][-1] < row["losses"][0]


def test_compression_goes_with_weights() -> None:
    row = run_signal(
        replace(TINY, scenario="swap100-1of2", method="loss_ema", density=0.1, steps=200, decay=0.9, warmup=20)
    )
    assert row["weights"][-1][0] > 0.9
    assert row["losses"][-1] < row["losses"][0]


def test_what_cannot_be_outvoted_is_left_out() -> None:
    two = methods_for(SCENARIOS["clean-2"], ["loss_ema"], baselines=True)
    eight = methods_for(SCENARIOS["flip-2of8"], ["loss_ema"], baselines=True)
    assert two[:2] == ["uniform", "loss_ema"]
    assert eight[:3] == ["uniform", "oracle", "loss_ema"]
    assert "krum" in eight
    assert "krum" not in two
    assert "median" in eight


def test_names_that_are_none() -> None:
    with pytest.raises(MisuseError, match="clean-2"):
        plan(TINY, ["clean"], ["loss_ema"], 1, baselines=False)
    with pytest.raises(MisuseError, match="loss_ema"):
        run_signal(replace(TINY, method="loss"))


def rows(gap: float) -> list[dict[str, Any]]:
    """Three seeds of uniform, oracle (``gap`` below) and a method halfway; seeds differ by much more."""
    common = {"scenario": "s", "bad": 1, "workers": 2, "weighted": True, "effective_workers": 1.0, "lowest_good": 1.0,
              "highest_bad": 1.0}  # fmt: skip
    wobble = (0.001, -0.001, 0.0)
    made = []
    for seed in range(3):
        for method, below in (("uniform", 0.0), ("oracle", gap), ("m", gap / 2)):
            loss = 2.0 + seed - below - (wobble[seed] if method != "uniform" else 0)
            made.append({**common, "method": method, "seed": seed, "loss": loss})
    return made


def test_a_gap_is_closed_by_what_seeds_have_in_common() -> None:
    lines = {line["method"]: line for line in summarise(rows(0.1))}
    assert lines["m"]["closed"] == pytest.approx(0.5)
    assert lines["oracle"]["gap"] == pytest.approx(0.1)
    assert lines["m"]["gained_error"] == pytest.approx(interval([0.051, 0.049, 0.05]))


def test_a_gap_within_noise_is_none() -> None:
    lines = {line["method"]: line for line in summarise(rows(0.001))}
    assert lines["m"]["closed"] is None
    assert lines["oracle"]["gap"] is None


def test_one_seed_says_nothing_of_a_gap() -> None:
    table = signal_markdown([{**row, "data": "grammar"} for row in rows(0.1) if row["seed"] == 0])
    assert "gap " not in table.splitlines()[3]


def test_runs_side_by_side_and_their_picture(tmp_path: Path) -> None:
    runs = plan(replace(TINY, steps=20), ["swap100-1of2"], ["loss_ema"], 1, baselines=False)
    seen: list[int] = []
    found = run_all(runs, jobs=2, report=lambda _row, done: seen.append(done))
    assert [row["method"] for row in found] == ["uniform", "oracle", "loss_ema"]
    assert sorted(seen) == [1, 2, 3]
    assert found[0]["losses"] == run_signal(runs[0])["losses"]
    signal_figure(found, tmp_path / "signal.png")
    assert (tmp_path / "signal.png").read_bytes()[:4] == b"\x89PNG"
    assert signal_markdown(found).count("\n") == 4


def test_the_command(tmp_path: Path) -> None:
    words = ["signal", "--scenarios", "clean-2", "--seeds", "1", "--no-baselines", "--data", "grammar", "--steps", "20",
             "--batch", "2", "--jobs", "1", "--json", "--out", str(tmp_path / "rows.jsonl")]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in kept] == ["uniform", "loss_ema"]
    assert kept[0]["losses"] == kept[1]["losses"], "clean workers are weighted alike, to the bit"

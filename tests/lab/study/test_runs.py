"""Runs are what they are called, equal when repeated, and go on after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.reasoning import SHORT, GymProblem, ReasoningGym
from thinwire.lab.study.execute import pending, read_records, run_study
from thinwire.lab.study.matrix import Study, study_of
from thinwire.lab.study.models import recipe_for, start_of
from thinwire.lab.study.overlap import add_overlaps, masks_file
from thinwire.lab.study.rewards import Rewarded
from thinwire.lab.study.stepping import Stepper, optimiser_of
from thinwire.lab.study.summary import read_summaries, summary_of, write_summaries
from thinwire.lab.study.train import LAGS, train
from thinwire.lab.tasks import Problem, SortDigits
from thinwire.probe.frequency import load_masks, positions_in

SMALL = {
    "centre": {"size": "small", "task": "sort_digits", "steps": 8, "objective": "pretrain"},
    "sizes": {"small": {"hidden": 64, "layers": 1}}, "tasks": {"sort_digits": {"length": 2}},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def study() -> Study:
    return study_of(SMALL | {"vary": [{"objective": ["pretrain", "sft", "rl"]}]})


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("starts")


def test_a_run_repeated_gives_the_same_record(study: Study, starts: Path) -> None:
    for run in study.runs:
        one, other = (train(study, run, starts) for _ in range(2))
        assert one.pop("seconds") > 0
        other.pop("seconds")
        assert one == other
        assert len(one["losses"]) == 8
        for lag in LAGS:
            steps = {row["step"] for row in one["rows"] if row["lag"] == lag}
            assert steps == set(range(lag, 9, lag))
        single = [row for row in one["rows"] if row["lag"] == 1 and row["step"] == 1]
        assert sum(row["elements"] for row in single) == one["parameters"]
        assert all(0 <= row["changed"] <= row["elements"] and 0 <= row["null"] <= row["elements"] for row in single)


def test_a_start_is_made_once_and_is_the_same_for_all_but_pretraining(study: Study, starts: Path) -> None:
    pretrain, sft, rl = study.runs
    one, other = start_of(study, sft, starts), start_of(study, rl, starts)
    fresh = start_of(study, pretrain, starts)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), fresh.parameters(), strict=True))
    assert recipe_for(study, rl).task.reward(Problem("21>", "12"), "12") == 1.0


def test_masks_say_which_weights_changed_and_overlaps_are_counted(tmp_path: Path) -> None:
    centre = SMALL["centre"] | {"objective": "sft", "lr": "high"}  # type: ignore[operator]
    study = study_of(SMALL | {"centre": centre, "vary": [{}, {"repeat": 1}, {"control": "random"}]})
    (tmp_path / "masks").mkdir()
    records = [train(study, run, tmp_path, masks=masks_file(tmp_path, study.id(run))) for run in study.runs]
    summaries = [summary_of(record) for record in records]
    add_overlaps(summaries, tmp_path, asdict(study.centre))
    pairs = [(pair["axis"], pair["with"]) for pair in summaries[0]["overlaps"]]
    assert pairs == [("repeat", 1), ("control", "random")]
    assert summaries[1]["overlaps"] == summaries[2]["overlaps"] == []  # they differ in two axes
    masks = [load_masks(masks_file(tmp_path, s["id"])) for s in summaries]
    last = {name: [set(positions_in(*m[name]).tolist()) for m in masks] for name in ("step", "whole")}
    for name, (one, other, _) in last.items():
        value, chance = summaries[0]["overlaps"][0][name]
        assert value == pytest.approx(len(one & other) / len(one | other), abs=1e-6)
        assert 0 < chance < 1
    changed = [sum(row["changed"] for row in record["rows"] if row["lag"] == 1 and row["step"] == 8)
               for record in records]  # fmt: skip
    assert [len(one) for one in last["step"]] == changed
    assert all(0 < summary["consecutive"] < 1 for summary in summaries)


def test_runs_keep_their_names_when_axes_are_added(study: Study) -> None:
    run = study.runs[1]
    assert study.id(run) == study.id(replace(run, repeat=0, start=""))
    assert len({study.id(one) for one in (run, replace(run, repeat=1), replace(run, start="sort_digits"))}) == 3
    assert run.draw == run.seed
    assert replace(run, repeat=2).draw != run.draw
    with pytest.raises(MisuseError, match="random weights"):
        replace(run, objective="pretrain", start="sort_digits")


def test_curvature_is_measured_of_the_runs_that_are_named(tmp_path: Path) -> None:
    study = study_of(SMALL | {"vary": [{"objective": ["rl", "sft"]}], "curvature": [{"objective": "rl"}]})
    rl, sft = (train(study, run, tmp_path) for run in study.runs)
    assert sft["curvature"] == []
    before, after = rl["curvature"]
    assert before != after
    for at in (before, after):
        assert at["fisher_trace"] > at["fisher_largest"] > 0
        assert at["hessian_smallest"] < 0 < at["hessian_largest"]
    again = train(study, study.runs[0], tmp_path)  # the start's is read, not measured again
    assert again["curvature"] == rl["curvature"]
    assert summary_of(rl)["curvature"][1]["fisher_trace"] == pytest.approx(after["fisher_trace"], rel=1e-4)


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))


def _stepped(**settings: object) -> tuple[Stepper, dict[str, torch.Tensor]]:
    model = _model()
    stepper = Stepper(model, optimiser_of("adam", 1e-3), **settings)  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in stepper.parameters.items()}
    for _ in range(3):
        x = torch.ones(2, 8, dtype=next(model.parameters()).dtype)
        model(x).square().sum().backward()
        assert stepper.step() > 0
    return stepper, before


def test_masters_are_served_rounded_and_bf16_is_updated_in_place() -> None:
    stepper, _ = _stepped(weights="masters")
    for name, served in stepper.parameters.items():
        assert stepper.owned[name].dtype == torch.float32
        assert torch.equal(served, stepper.owned[name].bfloat16())
    in_place, _ = _stepped(weights="bf16")
    assert all(in_place.owned[n] is p and p.dtype == torch.bfloat16 for n, p in in_place.parameters.items())
    full, _ = _stepped(weights="fp32")
    assert all(p.dtype == torch.float32 for p in full.parameters.values())


@pytest.mark.parametrize("enforce", ["random", "gradient"])
def test_enforced_sparsity_moves_no_other_weight(enforce: str) -> None:
    stepper, before = _stepped(weights="fp32", enforce=enforce, density=0.25)
    for name, now in stepper.parameters.items():
        changed = int((now != before[name]).sum())
        assert 0 < changed <= round(0.25 * now.numel())


def test_random_gradients_have_the_norm_of_the_real_ones() -> None:
    stepper = Stepper(_model(), optimiser_of("sgd", 1.0), weights="fp32", control="random", clip_norm=1e9)
    before = {name: p.detach().clone() for name, p in stepper.parameters.items()}
    gradients = {name: torch.randn_like(p) for name, p in stepper.parameters.items()}
    for name, parameter in stepper.parameters.items():
        parameter.grad = gradients[name].clone()
    stepper.step()
    for name, now in stepper.parameters.items():
        moved = before[name] - now.detach()
        assert float(moved.norm()) == pytest.approx(float(gradients[name].norm()), rel=1e-4)
        assert abs(float(torch.nn.functional.cosine_similarity(moved.flatten(), gradients[name].flatten(), 0))) < 0.9


def test_rewards_are_exact_partial_or_noisy() -> None:
    problem = Problem("312>", "123")
    task = SortDigits(3)
    assert [Rewarded(task, "partial").reward(problem, text) for text in ("123", "120", "", "1234")] == [
        1.0, pytest.approx(2 / 3), 0.0, 0.75
    ]  # fmt: skip
    noisy = Rewarded(task, "noisy", source=random.Random(0))
    wrong = sum(noisy.reward(problem, "123") < 1 for _ in range(2000)) / 2000
    assert abs(wrong - 0.2) < 0.04


@pytest.mark.parametrize("name", sorted(SHORT))
def test_tasks_of_reasoning_gym_score_their_own_answers(name: str) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    task = ReasoningGym(name)
    for seed in range(20):
        problem = task.problem(random.Random(seed))
        assert problem == task.problem(random.Random(seed))
        assert task.reward(problem, problem.answer) == 1.0
        assert 0 <= task.reward(problem, "nothing") < 1
        assert Rewarded(task, "exact").reward(problem, problem.answer + "0") == 0.0
        assert problem.prompt.endswith("=")
    with pytest.raises(MisuseError):
        task.reward(Problem("1", "1"), "1")


def test_what_reasoning_gym_has_not_is_refused() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    with pytest.raises(MisuseError, match="no short question"):
        ReasoningGym("mini_sudoku")
    with pytest.raises(MisuseError, match="no task"):
        ReasoningGym("gcd", max_valeu=3)
    unreadable = ReasoningGym("prime_factorization", short=False)
    problem = unreadable.problem(random.Random(0))
    assert isinstance(problem, GymProblem)
    assert unreadable.reward(problem, "x") == 0.0


def test_a_study_that_was_killed_goes_on(tmp_path: Path) -> None:
    config = tmp_path / "study.yaml"
    config.write_text(json.dumps(SMALL | {"seeds": list(range(6))}))
    command = [sys.executable, "-m", "thinwire", "study", "sparsity", "-c", str(config), "-o", str(tmp_path / "out"),
               "-j", "1"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    results = tmp_path / "out" / "runs"
    deadline = time.monotonic() + 120
    while len(list(results.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    study = study_of(json.loads(config.read_text()))
    done = {record["id"]: record for record in read_records(study, tmp_path / "out")}
    assert 2 <= len(done) < 6
    ended = []
    failed = run_study(study, tmp_path / "out", jobs=1, on_done=lambda stage, run, sound: ended.append((stage, sound)))
    assert not failed
    assert ended == [("run", True)] * (6 - len(done))
    assert not pending(study, tmp_path / "out")
    records = read_records(study, tmp_path / "out")
    assert all(record == done.get(record["id"], record) for record in records)
    summaries = [summary_of(record) for record in records]
    write_summaries(summaries, tmp_path / "s.jsonl")
    assert read_summaries(tmp_path / "s.jsonl") == json.loads(json.dumps(summaries))


def test_runs_that_fail_are_named_and_damaged_results_are_too(tmp_path: Path) -> None:
    study = study_of(SMALL | {"sizes": {"small": {"hidden": 64, "layers": 1, "no_such": 1}}})
    failed = run_study(study, tmp_path, jobs=1)
    assert failed == list(study.runs)
    note = json.loads((tmp_path / "failed" / f"{study.id(study.runs[0])}.json").read_text())
    assert "no_such" in note["error"]
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / f"{study.id(study.runs[0])}.json").write_text("{")
    with pytest.raises(MalformedError, match="remove it"):
        read_records(study, tmp_path)
    with pytest.raises(MisuseError):
        run_study(replace(study, runs=()), tmp_path, jobs=0)

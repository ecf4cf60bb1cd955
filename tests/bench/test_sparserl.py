"""The benchmark as a whole: suites, runs that go on after a kill, results, statistics, the report."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from thinwire.bench.sparserl import Suite, cell_id, choose_lrs, read_suite, run_suite, suite_of
from thinwire.bench.sparserl_figures import front
from thinwire.bench.sparserl_report import finding, insert, leaderboard, markdown, write_report
from thinwire.bench.sparserl_results import read_result, read_results
from thinwire.bench.sparserl_statistics import bootstrap, compare, pairs_of
from thinwire.bench.sparserl_summary import METRICS, Summary, read_summaries, summary_of, write_summaries
from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.yaml_files import read_mapping

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "title": "a model of a few thousand weights", "steps": 2, "prompts": 2, "group": 2, "problems": 8, "seeds": [0, 1],
    "tune": {"seed": 9, "steps": 1, "problems": 8},
    "models": {"atom": {"hidden": 32, "layers": 1, "warm": {"target": 0.0, "batch": 8}}},
    "tasks": ["count-bits", "gcd"], "methods": ["dense", "random-mask", "aspg"],
    "lrs": {"dense": 1e-3, "random-mask": 1e-2, "aspg": [1e-3, 1e-2]},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def suite(**changes: Any) -> Suite:
    return suite_of(SMALL | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suite")
    seen: list[tuple[str, bool]] = []
    failed = run_suite(suite(), out, jobs=0, on_done=lambda stage, name, sound: seen.append((stage, sound)))
    assert failed == []
    assert [stage for stage, _ in seen] == ["start"] * 3 + ["tuning"] * 4 + ["run"] * 12
    return out


# --- suites -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "middle", "hub"])
def test_the_suites_are_what_they_promise(name: str) -> None:
    found = read_suite(name)
    assert len(found.seeds) >= 5
    assert len(found.methods) >= 8
    assert len(found.tasks) >= 4
    if name == "small":
        assert len(found.models) >= 3
        assert len({len(found.grid(method)) for method in found.methods}) == 1, "the same budget for each method"
    cells = found.cells({(m, n): 1e-3 for m in found.models for n in found.methods})
    assert len({cell_id(cell) for cell in cells}) == len(cells)
    assert found.tune["seed"] not in found.seeds


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"method": []}, "no key"), ({"methods": ["desne"]}, "dense"), ({"tasks": ["gcb"]}, "gcd"),
     ({"seeds": []}, "one entry"), ({"seeds": [0, 0]}, "none twice"), ({"seeds": [-1]}, "from 0"),
     ({"models": {}}, "mapping"), ({"models": {"a": 3}}, "mapping"), ({"tune": {"seed": 1}}, "tuning"),
     ({"lrs": {"denes": 1.0}}, "dense")],
)  # fmt: skip
def test_a_suite_that_is_none_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MisuseError, match=complaint):
        suite(**changes)


def test_parts_of_a_suite_are_chosen_by_name() -> None:
    chosen = suite().chosen(methods=["aspg"], seeds=[7], tasks=["gcd", "sort-digits"])
    cells = chosen.cells({("atom", "aspg"): 1e-3})
    assert {(c.task, c.method, c.seed) for c in cells} == {("gcd", "aspg", 7), ("sort-digits", "aspg", 7)}
    assert cells[0].others == ("count-bits", "sort-digits")
    with pytest.raises(MisuseError, match="atom"):
        suite().chosen(models=["molecule"])
    with pytest.raises(MisuseError, match="small"):
        read_suite("tiny")


# --- runs -------------------------------------------------------------------------------------------------------------


def test_results_have_pefts_parts_and_ours(made: Path) -> None:
    results = read_results(made)
    assert len(results) == 12
    train = results[0]["train_info"]
    assert {"run_info", "train_info", "meta_info"} <= set(results[0])
    assert {"accelerator_memory_max", "train_time", "file_size", "num_trainable_params", "num_total_params", "status",
            "metrics"} <= set(train)  # fmt: skip
    assert {"system_info", "package_info", "model_info", "dataset_info", "pytorch_info"} <= set(results[0]["meta_info"])
    assert train["status"] == "success"
    assert len(train["metrics"]) == 2
    assert train["host_memory_max"] is None or train["host_memory_max"] >= 0


def test_learning_rates_are_chosen_on_the_tuning_seed_alone(made: Path, tmp_path: Path) -> None:
    tuning = [read_result(path) for path in (made / "tuning").glob("*.json")]
    assert {r["run_info"]["train_config"]["seed"] for r in tuning} == {9}
    assert all(r["run_info"]["train_config"]["part"] == "tune" for r in tuning)
    (tmp_path / "tuning").mkdir()
    for path in (made / "tuning").glob("*.json"):  # let the higher rate win, then the lower
        result = json.loads(path.read_text())
        result["train_info"]["scores"]["sampled"] = result["run_info"]["train_config"]["lr"]
        (tmp_path / "tuning" / path.name).write_text(json.dumps(result))
    assert choose_lrs(suite(), tmp_path)["atom", "aspg"] == 1e-2
    for path in (tmp_path / "tuning").glob("*.json"):
        path.write_text(path.read_text().replace('"sampled": 0.01', '"sampled": 0.0001'))
    assert choose_lrs(suite(), tmp_path)["atom", "aspg"] == 1e-3
    assert choose_lrs(suite(), tmp_path)["atom", "dense"] == 1e-3


def test_a_cut_off_result_is_named_by_the_report_and_made_again_by_a_run(made: Path) -> None:
    path = next((made / "results").glob("*dense*seed1*.json"))
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(MalformedError, match="remove"):
        read_results(made)
    runs: list[str] = []
    run_suite(suite(), made, jobs=0, on_done=lambda stage, name, _: runs.append(name) if stage == "run" else None)
    assert runs == [path.stem]
    again, before = json.loads(path.read_text()), json.loads(whole)
    assert again["train_info"]["metrics"] == before["train_info"]["metrics"], "the same seed gives the same numbers"
    assert again["train_info"]["scores"] == before["train_info"]["scores"]


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"run_info": {"schema": 99}}', ""])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(MalformedError, match="remove"):
        read_result(file)
    with pytest.raises(MisuseError, match="no results"):
        read_results(tmp_path / "nowhere")


def test_what_raises_is_noted_and_the_others_go_on(made: Path, tmp_path: Path) -> None:
    task = tmp_path / "cruel.py"
    task.write_text(
        "from thinwire.lab.sparserl.tasks.base import TaskEntry\nfrom thinwire.lab.tasks import SortDigits\n"
        "class Cruel(SortDigits):\n    def reward(self, problem, completion):\n        raise ValueError('no reward')\n"
        "TASK = TaskEntry(about='raises', make=lambda part: Cruel(3), answer_tokens=4, generated=False)\n"
    )
    chosen = suite(lrs={"dense": 1e-3}).chosen(methods=["dense"], seeds=[0], tasks=["gcd"])
    out = tmp_path / "out"
    bad = replace(chosen, tasks=("gcd", str(task)))  # its start knows the good tasks only
    failed = run_suite(bad, out, jobs=0)
    assert [name for name in failed if "--cruel--" in name] == failed
    assert len(failed) == 1
    assert "no reward" in (out / "failed" / f"{failed[0]}.txt").read_text()
    assert len(read_results(out)) == 1


def test_a_method_from_outside_runs_beside_the_others(tmp_path: Path) -> None:
    file = tmp_path / "half.py"
    file.write_text(
        "from thinwire.lab.sparserl.masked import masked\nfrom thinwire.lab.sparserl.methods.base import Method\n"
        "METHOD = Method(about='half', prepare=lambda model, setting: masked(model, setting, 0.5), lrs=(1e-3,))\n"
    )
    chosen = suite().chosen(methods=[str(file)], seeds=[0], tasks=["gcd"])
    assert run_suite(chosen, tmp_path / "out", jobs=0) == []
    (found,) = read_summaries(tmp_path / "out")
    assert found["trainable"] == round(0.5 * found["total"])


@pytest.mark.slow
def test_a_suite_that_is_killed_goes_on_where_it_was(made: Path, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(SMALL))  # JSON is YAML
    out = tmp_path / "out"
    command = [sys.executable, "-m", "thinwire", "bench", "sparserl", "--suite", str(config), "-o", str(out), "-j", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while time.monotonic() < until and len(list((out / "results").glob("*.json"))) < 3:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (out / "results").glob("*.json")}
    assert 3 <= len(before) < 12
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for path, when in before.items():
        assert path.stat().st_mtime_ns == when, "what was made is kept"
    ours = {s["id"]: s["score"] for s in read_summaries(out)}
    assert ours == {s["id"]: s["score"] for s in read_summaries(made)}, "and the numbers are those of a whole run"


# --- statistics and the report ----------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_bootstrap_holds_the_mean_and_stays_within_the_values(strata: list[list[float]]) -> None:
    found = bootstrap(strata)
    assert found.value == pytest.approx(float(np.mean([np.mean(v) for v in strata])))
    least, most = (float(np.mean([f(v) for v in strata])) for f in (min, max))
    assert least - 1e-9 <= found.low <= found.high <= most + 1e-9
    assert found == bootstrap(strata)


def test_a_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    source = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        found = bootstrap([source.normal(0.3, 1, 20).tolist(), source.normal(0.3, 1, 20).tolist()])
        hits += found.low <= 0.3 <= found.high
    assert 85 <= hits <= 100


@pytest.mark.parametrize("wrong", [[], [[]], [[1.0], []], [[math.nan]], [[math.inf]]])
def test_a_bootstrap_of_nothing_is_refused(wrong: list[list[float]]) -> None:
    with pytest.raises(MisuseError):
        bootstrap(wrong)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    found = front(points)

    def beaten(i: int) -> bool:
        return any(
            (p[0] <= points[i][0] and p[1] >= points[i][1]) and (p[0] < points[i][0] or p[1] > points[i][1])
            for p in points
        )

    assert {points[i] for i in found} == {points[i] for i in range(len(points)) if not beaten(i)}


def line(method: str, seed: int, score: float, task: str = "gcd", **changes: Any) -> Summary:
    values = dict.fromkeys(METRICS, 1.0) | {"score": score, "gain": score - 0.3, "sync_bytes": 5000.0}
    return {"model": "m", "task": task, "method": method, "seed": seed, "status": "success", "total": 100, "lr": 1e-3,
            "error": "", **values, **changes}  # fmt: skip


def lines(difference: float, noise: float = 0.01) -> list[Summary]:
    source = np.random.default_rng(1)
    return [
        line(method, seed, 0.5 + (difference if method == "aspg" else 0.0) + noise * float(source.normal()), task)
        for method in ("aspg", "random-mask", "dense") for seed in range(5) for task in ("gcd", "sort")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("difference", "verdict", "words"),
    [(0.1, "better", "beats"), (-0.1, "worse", "is worse"), (0.0, "undecided", "not shown")],
)
def test_the_report_begins_with_what_was_asked(difference: float, verdict: str, words: str, tmp_path: Path) -> None:
    rows = lines(difference, noise=0.05)
    found = compare(rows, "aspg", "random-mask")
    assert found is not None
    assert found.verdict == verdict
    text = markdown(rows)
    assert words in text.split("\n")[0]
    assert text.startswith(f"**{finding(rows)}**")
    values = [v for by_seed in pairs_of(rows, "aspg", "random-mask").values() for v in by_seed.values()]
    assert found.bootstrap.value == pytest.approx(float(np.mean(values)))
    assert f"{100 * found.bootstrap.value:+.1f} points" in text


def test_pairs_are_of_the_same_start_only() -> None:
    rows = [line("aspg", 0, 0.6), line("aspg", 1, 0.7), line("random-mask", 1, 0.5), line("random-mask", 2, 0.1)]
    assert pairs_of(rows, "aspg", "random-mask") == {("m", "gcd"): {1: pytest.approx(0.2)}}
    assert compare(rows, "aspg", "dense") is None
    assert "Not answered" in finding([line("dense", 0, 0.5)])


def test_a_run_that_diverged_scores_nothing_and_is_counted(made: Path, tmp_path: Path) -> None:
    result = read_results(made)[0]
    result["train_info"] |= {"status": "diverged", "scores": {"sampled": None}, "others": {}}
    result["train_info"]["metrics"] = result["train_info"]["metrics"][:1]
    found = summary_of(result)
    assert found["score"] == 0
    assert found["forgetting"] is None
    rows = [line("aspg", 0, 0.5), line("dense", 0, 0.4, status="diverged", forgetting=None, sync_bytes=None)]
    board = leaderboard(rows)
    assert [e["diverged"] for e in board["entries"]] == [0, 1]
    assert "(1 diverged)" in markdown(rows)
    assert len(write_report(rows, tmp_path)) == 4


def test_kept_rows_give_the_same_report_and_damaged_ones_are_refused(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_summaries(file, read_summaries(made))
    kept = read_summaries(file)
    assert len(kept) == 12
    assert finding(kept) == finding(read_summaries(made))
    for text in ("", "{}\n", file.read_text()[:-40]):
        file.write_text(text)
        with pytest.raises((MalformedError, MisuseError)):
            read_summaries(file)
    with pytest.raises(MisuseError, match="no folder"):
        read_summaries(tmp_path / "nowhere")


def test_the_command_runs_and_reports(made: Path, tmp_path: Path) -> None:
    from thinwire.bench.cli import app

    def run(*words: str, code: int = 0) -> Any:
        done = CliRunner().invoke(app, ["sparserl", *words])
        assert done.exit_code == code or (code and isinstance(done.exception, MisuseError)), done.output
        return done

    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(SMALL))  # JSON is YAML
    done = run("report", str(made), "-o", str(tmp_path / "r"), "--json", "--rows", str(tmp_path / "kept.jsonl"))
    board = json.loads(done.stdout)
    assert len(board["entries"]) == 3
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        "report.md", "leaderboard.json", "leaderboard.html", "pareto-atom.png",
    }  # fmt: skip
    html = (tmp_path / "r" / "leaderboard.html").read_text()
    assert "http" not in html.replace("http-equiv", ""), "the page loads nothing"
    assert html.count("<tr>") == 4
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 12
    assert "did you mean" in str(run("--methods", "apsg", code=2).exception)
    assert "4 runs to tune, 12 runs" in run("--suite", str(config), "-o", str(made), "--list").stderr


def test_the_report_goes_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- sparserl: begin -->\nold\n<!-- sparserl: end -->\nafter\n")
    for text in ("new", "newer"):
        insert(text, page)
    assert page.read_text() == "before\n<!-- sparserl: begin -->\n\nnewer\n<!-- sparserl: end -->\nafter\n"
    page.write_text("<!-- sparserl: end --> <!-- sparserl: begin -->")
    with pytest.raises(MisuseError, match="no <!--"):
        insert("new", page)


def test_the_tables_of_the_page_are_those_of_the_rows() -> None:
    page = (ROOT / "docs" / "sparserl.md").read_text()
    kept = sorted((ROOT / "bench" / "results").glob("sparserl-*.jsonl"))
    rows = [row for path in kept for row in read_summaries(path)]
    shown = page.partition("<!-- sparserl: begin -->")[2].partition("<!-- sparserl: end -->")[0]
    assert (markdown(rows).strip() if rows else "No rows are kept") in shown
    for metric in METRICS:
        assert f"`{metric}`" in page


def test_the_table_of_choices_is_that_of_its_rows() -> None:
    page = (ROOT / "docs" / "sparserl.md").read_text().partition("### Why drawing")[2].partition("## ")[0]
    results = ROOT / "bench" / "results"
    rows = read_summaries(results / "choice-of-weights.jsonl")
    rows += [row for row in read_summaries(results / "sparserl-small.jsonl") if row["model"] == "llama-0.6m"]
    for name in ("aspg_each_tensor", "random_where_gradients", "top_of_each_tensor", "aspg", "frozen-subnetwork"):
        method = f"examples/sparserl/{name}.py" if "_" in name else name
        found = compare(rows, method, "random-mask")
        assert found is not None
        assert found.student is not None
        scores = [row["score"] for row in rows if row["method"] == method]
        points, (low, high) = found.bootstrap, (found.student.low, found.student.high)
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} "))
        assert line.endswith(
            f"| {100 * sum(scores) / len(scores):.1f} | {100 * points.value:+.1f} ({100 * points.low:+.1f} to "
            f"{100 * points.high:+.1f}) | {100 * low:+.1f} to {100 * high:+.1f} |"
        )


def test_configurations_name_nothing_unknown() -> None:
    for path in (ROOT / "configs").glob("sparserl-*.yaml"):
        suite_of(read_mapping(path))

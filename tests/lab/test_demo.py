"""The demo: its records, its judgement, and whole runs in real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from thinwire.errors import MisuseError
from thinwire.lab.demo.command import main, print_summary, run_demo
from thinwire.lab.demo.director import DemoError, Director
from thinwire.lab.demo.journal import Journal, JournalReader
from thinwire.lab.demo.live import LiveView, render
from thinwire.lab.demo.options import DemoOptions, RunPlan
from thinwire.lab.demo.picture import Picture
from thinwire.lab.demo.spool import SpoolReader, SpoolWriter
from thinwire.lab.demo.summary import DemoSummary, rise_z, summarise
from thinwire.lab.rollouts import Rollouts

pytest.importorskip("transformers")
pytest.importorskip("plotly")


def plan_in(folder: Path, **changes: Any) -> RunPlan:
    plan = RunPlan(folder, "nano", "a test", seed=1, lr=1e-3, steps=10, seconds=60.0, workers=2, max_staleness=4)
    return replace(plan, **changes)


def rollouts(rewards: list[float]) -> Rollouts:
    count = len(rewards)
    tokens = torch.arange(count * 5).view(count, 5)
    mask = torch.tensor([[0.0, 0, 1, 1, 1]]).repeat(count, 1)
    return Rollouts(tokens, torch.ones_like(tokens), mask, -mask, torch.tensor(rewards))


# --- records -------------------------------------------------------------------------------------------------------


def test_a_line_cut_off_by_a_kill_is_not_read_and_the_next_life_is(tmp_path: Path) -> None:
    first = Journal(tmp_path, "worker-0", 1)
    first.write("applied", version=1)
    with (tmp_path / "worker-0.1.jsonl").open("a") as file:
        file.write('{"t": 1.0, "who": "worker-0", "li')
    reader = JournalReader(tmp_path)
    assert [event["what"] for event in reader.read()] == ["applied"]
    Journal(tmp_path, "worker-0", 2).write("ready")
    assert [(event["life"], event["what"]) for event in reader.read()] == [(2, "ready")]
    assert reader.read() == []


def test_a_run_is_read_by_other_processes_as_it_was_written(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    plan.save()
    assert RunPlan.load(tmp_path) == plan


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"steps": 0}, {"minutes": 0.0}, {"lr": -1.0}, {"max_staleness": -1}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        DemoOptions(**wrong)


def test_an_unknown_model_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="tiny, smollm2"):
        run_demo(DemoOptions(model="huge", out=tmp_path))
    assert list(tmp_path.iterdir()) == []


# --- rollouts on their way -----------------------------------------------------------------------------------------


def test_batches_arrive_whole_oldest_weights_first_and_once(tmp_path: Path) -> None:
    one, two = SpoolWriter(tmp_path, "worker-1", 1), SpoolWriter(tmp_path, "worker-2", 1)
    two.put(rollouts([0.0, 1.0]), version=12, digest="bb")
    one.put(rollouts([1.0, 1.0]), version=9, digest="aa")
    one.put(rollouts([0.5, 0.0]), version=12, digest="bb")
    assert (one.waiting(), two.waiting()) == (2, 1)
    reader = SpoolReader(tmp_path)
    batches = list(reader.take())
    assert [(b.worker, b.version, b.digest) for b in batches] == [
        ("worker-1", 9, "aa"),
        ("worker-1", 12, "bb"),
        ("worker-2", 12, "bb"),
    ]
    assert batches[1].rollouts.rewards.tolist() == [0.5, 0.0]
    for field in ("tokens", "attention", "mask", "logprobs"):
        assert torch.equal(getattr(batches[0].rollouts, field), getattr(rollouts([1.0, 1.0]), field))
    assert (list(reader.take()), one.waiting()) == ([], 0)


def test_a_file_that_a_killed_worker_left_half_written_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "00000001.worker-0.001-000001.partial").write_bytes(b"half a hea")
    writer = SpoolWriter(tmp_path, "worker-0", 2)
    assert writer.waiting() == 0
    writer.put(rollouts([1.0]), version=1, digest="aa")
    assert len(list(SpoolReader(tmp_path).take())) == 1


# --- judgement -----------------------------------------------------------------------------------------------------


def made_up_events(versions: int = 4) -> list[dict[str, Any]]:
    """The records of a small run in which everything is as promised."""
    digest = {version: f"{version:064x}" for version in range(1, versions + 1)}
    events: list[dict[str, Any]] = []

    def add(t: float, who: str, what: str, life: int = 1, **facts: Any) -> None:
        events.append({"t": t, "who": who, "life": life, "what": what, **facts})

    for name in ("worker-0", "worker-1"):
        add(0.0, "director", "mark", target=name, action="start")
    add(1.0, "trainer", "built", weights=100)
    before = {"moment": "before", "sampled": 0.25, "greedy": 0.3, "per_problem": [0.0, 0.5, 0.0, 0.5] * 8}
    after = {"moment": "after", "sampled": 0.75, "greedy": 0.8, "per_problem": [1.0, 1.0, 0.5, 0.5] * 8}
    add(2.0, "trainer", "evaluated", **before)
    for version in digest:
        facts: dict[str, Any] = {
            "version": version, "step": version - 1, "digest": digest[version], "full_bytes": 200, "elements": 100,
            "kind": "delta", "patch_bytes": 7, "anchor_bytes": 0, "total_bytes": 10, "changed": 2, "density": 0.02,
            "seconds": {"encode": 0.01, "total": 0.02},
        }  # fmt: skip
        if version == 1:
            facts |= {"kind": "anchor", "patch_bytes": 0, "anchor_bytes": 205, "total_bytes": 208, "density": 1.0}
        else:
            facts |= {
                "reward": 0.1 * version, "loss": 0.0, "gradient_norm": 1.0, "drift": 0.0, "clipped": 0.0,
                "staleness": [0, 1], "workers": ["worker-0"], "wait_s": 0.0, "step_s": 0.5,
            }  # fmt: skip
        add(10.0 * version, "trainer", "published", **facts)
        for number in range(2):
            add(
                10.0 * version + 1, f"worker-{number}", "applied", version=version, step=version - 1, hops=1,
                digest=digest[version], own_digest=digest[version], bytes_fetched=10, seconds={"fetch": 0.001},
            )  # fmt: skip
    add(15.0, "director", "mark", target="worker-1", action="kill")
    add(18.0, "director", "mark", target="worker-1", action="restart")
    add(18.5, "worker-1", "ready", life=2)
    add(80.0, "trainer", "trained", version=versions, digest=digest[versions])
    add(81.0, "trainer", "evaluated", **after)
    add(82.0, "trainer", "done")
    return sorted(events, key=lambda event: event["t"])


def picture_of(events: list[dict[str, Any]], folder: Path) -> Picture:
    picture = Picture(plan_in(folder), begin=0.0)
    for event in events:
        picture.take(event)
    return picture


def failed(summary: DemoSummary) -> list[str]:
    return [check.name for check in summary.checks if not check.passed]


def test_a_run_as_promised_passes(tmp_path: Path) -> None:
    summary = summarise(picture_of(made_up_events(), tmp_path))
    assert failed(summary) == []
    assert (summary.versions, summary.digests_compared, summary.digest_mismatches) == (4, 8, 0)
    assert (summary.sent_bytes, summary.all_full_bytes, summary.patch_bytes) == (238, 800, 7)
    assert (summary.reward_before, summary.reward_after, summary.density_median) == (0.25, 0.75, 0.02)
    assert [worker.lives for worker in summary.workers] == [1, 2]
    assert json.loads(json.dumps(summary.as_json()))["passed"] is True


@pytest.mark.parametrize("where", ["digest", "own_digest"])
def test_one_wrong_digest_fails_the_run(tmp_path: Path, where: str) -> None:
    events = made_up_events()
    wrong = next(e for e in events if e["who"] == "worker-1" and e["what"] == "applied" and e["version"] == 3)
    wrong[where] = "f" * 64
    picture = picture_of(events, tmp_path)
    assert picture.mismatches() == [("worker-1", 3)]
    assert "every worker ran the trainer's weights, bit for bit" in failed(summarise(picture))


def test_a_worker_that_stays_behind_fails_the_run(tmp_path: Path) -> None:
    events = [e for e in made_up_events() if not (e["who"] == "worker-1" and e.get("version") == 4)]
    assert failed(summarise(picture_of(events, tmp_path))) == ["all followed to the last version"]


def test_a_version_that_no_worker_ran_fails_the_run(tmp_path: Path) -> None:
    events = [e for e in made_up_events() if not (e["what"] == "applied" and e["version"] == 2)]
    assert failed(summarise(picture_of(events, tmp_path))) == ["every version was checked by a worker"]


def test_a_reward_that_did_not_rise_fails_the_run(tmp_path: Path) -> None:
    events = made_up_events()
    after = next(e for e in events if e.get("moment") == "after")
    after |= {"sampled": 0.26, "per_problem": [0.0, 0.5, 0.0, 0.5] * 7 + [0.5, 0.5, 0.0, 0.5]}
    assert failed(summarise(picture_of(events, tmp_path))) == ["the reward rose"]


def test_the_rise_is_judged_by_its_standard_error() -> None:
    assert rise_z([0.0] * 4, [0.0] * 4) == 0.0
    assert rise_z([0.0] * 100, [0.0] * 50 + [1.0] * 50) == pytest.approx(9.95, abs=0.01)
    assert rise_z([1.0, 0.0], [0.0, 1.0]) == 0.0


# --- views ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 12, 100])
def test_the_live_view_can_be_drawn_at_every_moment(tmp_path: Path, count: int) -> None:
    console = Console(file=StringIO(), width=110, force_terminal=True)
    console.print(render(picture_of(made_up_events()[:count], tmp_path)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "worker-1" in text


def test_away_from_a_terminal_the_view_is_plain_lines(tmp_path: Path) -> None:
    out = StringIO()
    with LiveView(Console(file=out, width=60), every_s=0.0) as view:
        view.show(picture_of(made_up_events()[:8], tmp_path))
        view.show(picture_of(made_up_events(), tmp_path))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert "\x1b" not in out.getvalue()
    assert "step 3" in lines[1]


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano_run(tmp_path_factory: pytest.TempPathFactory) -> DemoSummary:
    options = DemoOptions(model="nano", workers=2, out=tmp_path_factory.mktemp("demo"), restart_delay_s=0.5)
    return run_demo(options, Console(file=StringIO()))


@pytest.mark.timeout(180)
def test_a_small_run_keeps_every_promise(nano_run: DemoSummary) -> None:
    assert failed(nano_run) == []
    assert nano_run.steps == 40
    assert nano_run.versions == nano_run.versions_verified == 41
    assert [worker.lives for worker in nano_run.workers] == [2, 1]
    assert {worker.last_version for worker in nano_run.workers} == {41}
    assert nano_run.sent_bytes < nano_run.all_full_bytes
    assert 0 < nano_run.density_median < 1
    out = StringIO()
    print_summary(nano_run, Console(file=out, width=200))
    assert "FAIL" not in out.getvalue()
    assert str(nano_run.page) in out.getvalue()


def test_the_page_holds_everything_it_needs(nano_run: DemoSummary) -> None:
    assert nano_run.page is not None
    page = nano_run.page.read_text(encoding="utf-8")
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\\s*=\\s*["']?(https?:)?//""", own)
    assert page.count("plotly.js v") >= 1
    for heading in ("Reward", "Bytes for each version", "Who ran which version when", "Density", "Digests"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("= same") >= nano_run.versions
    assert "≠" not in page


def test_the_summary_lies_beside_the_page(nano_run: DemoSummary) -> None:
    kept = json.loads((nano_run.folder / "summary.json").read_text())
    assert kept["passed"] is True
    assert kept["reward_after"] == nano_run.reward_after


def test_a_worker_that_cannot_start_ends_the_run_with_its_log(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    plan.save()
    plan.store.write_text("a file where the store should be")
    with pytest.raises(DemoError, match="exit code"):
        Director(plan, restart_delay_s=0.0).run(lambda _: None)


@pytest.mark.timeout(120)
def test_workers_do_not_outlive_a_killed_director(tmp_path: Path) -> None:
    director = subprocess.Popen(
        [sys.executable, "-m", "thinwire.lab.demo", "--model", "nano", "--steps", "100000", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        sampled = _wait_for(
            lambda: [p for p in tmp_path.glob("*/journals/worker-0.1.jsonl") if "sampled" in p.read_text()]
        )
        assert sampled
    finally:
        director.send_signal(signal.SIGKILL)
        director.wait()
    folder = sampled[0].parent.parent

    def alive() -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in command and b"thinwire.lab.demo." in command:
                found.append(int(process.name))
        return found

    try:
        assert _wait_for(lambda: not alive())
    finally:
        for pid in alive():
            os.kill(pid, signal.SIGKILL)


def _wait_for(condition: Any, seconds: float = 50.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < limit:
        time.sleep(0.1)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_complete_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["passed"] is True
    assert summary["density_median"] < 0.03
    assert summary["all_full_bytes"] > 20 * summary["sent_bytes"]
    assert [worker["lives"] for worker in summary["workers"]] == [1, 2, 1]

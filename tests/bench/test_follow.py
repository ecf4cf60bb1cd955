"""Following under fire: the plan of kills and joins, a short run, and what a wrong digest leads to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from thinwire.bench import follow
from thinwire.bench.cli import app
from thinwire.bench.follow import FollowOptions, run_follow
from thinwire.bench.follow_plan import plan_events
from thinwire.bench.follow_worker import memory_digest, random_model
from thinwire.errors import MisuseError
from thinwire.sync.publisher import Publisher


@given(st.integers(20, 400), st.integers(1, 5), st.integers(0, 6), st.integers(0, 2**32))
def test_a_plan_kills_only_the_living_and_brings_all_back(versions: int, consumers: int, kills: int, seed: int) -> None:
    try:
        plan = plan_events(versions, consumers, kills, seed)
    except MisuseError:
        assert versions < 15 * (kills + consumers)
        return
    alive: set[int] = set()
    killed = 0
    for version in sorted(plan):
        assert 1 <= version <= max(versions * 9 // 10, 2)
        for event in sorted(plan[version], key=lambda e: e.kind != "kill"):
            if event.kind == "kill":
                alive.remove(event.consumer)
                killed += 1
            else:
                assert event.consumer not in alive
                alive.add(event.consumer)
    assert alive == set(range(consumers))
    assert killed == kills
    assert plan_events(versions, consumers, kills, seed) == plan


def test_the_digest_from_memory_is_the_published_one(tmp_path: Path) -> None:
    model = random_model(1 << 16, seed=1)
    published = Publisher(str(tmp_path)).publish(model)
    assert memory_digest(model) == published.digest
    next(iter(model.values())).view(-1)[0] += 1
    assert memory_digest(model) != published.digest


def check(row: dict, versions: int, kills: int) -> None:
    assert row["mismatches"] == []
    assert row["stalled"] == []
    assert row["crashes"] == []
    assert (row["versions"], row["kills"], row["joins"]) == (versions, kills, kills + 3)
    assert row["reports"] >= row["joins"]
    assert row["published_bytes"] < row["full_bytes"] / 2


def test_killed_and_late_consumers_end_at_the_published_bits(tmp_path: Path) -> None:
    check(run_follow(tmp_path, FollowOptions(20, 3, 2, 1 << 18, seed=4)), 20, 2)


@pytest.mark.slow
def test_three_hundred_versions_under_twenty_kills(tmp_path: Path) -> None:
    check(run_follow(tmp_path, FollowOptions(seed=4)), 300, 20)


def test_a_wrong_digest_and_an_unfinished_line_are_told_apart(tmp_path: Path) -> None:
    consumer = follow._Consumer(0, tmp_path, tmp_path / "store", FollowOptions())
    consumer.path.write_text("1 aa\n2 bb\n3 c")
    assert consumer.reports() == [(1, "aa"), (2, "bb")]
    assert follow._compare([consumer], {1: "aa", 2: "bb"}) == (2, [])
    count, wrong = follow._compare([consumer], {1: "aa", 2: "cc"})
    assert (count, len(wrong)) == (2, 1)
    assert "version 2" in wrong[0]


@pytest.mark.parametrize("kind", ["mismatches", "stalled", "crashes"])
def test_the_command_fails_if_anything_went_wrong(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "versions": 20, "consumers": 3, "kills": 2, "joins": 5, "reports": 9, "mismatches": [], "stalled": [],
        "crashes": [], "published_bytes": 1, "full_bytes": 2, "share_of_full_checkpoints": 0.5, "seconds": 1.0,
    }  # fmt: skip
    monkeypatch.setattr(follow, "run_follow", lambda *_args, **_kw: {**row, kind: ["consumer 1"]})
    done = CliRunner().invoke(app, ["follow", "--versions", "20", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)[kind] == ["consumer 1"]
    monkeypatch.setattr(follow, "run_follow", lambda *_args, **_kw: row)
    assert CliRunner().invoke(app, ["follow", "--versions", "20"]).exit_code == 0

"""The fleet benchmark counts what is wrong, finds what is late, and its docs are those of its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from thinwire.bench import fleet as bench
from thinwire.bench import fleet_worker
from thinwire.bench.fleet import FleetOptions, run_fleet
from thinwire.bench.fleet_cli import fleet_figure, fleet_markdown, fleet_table
from thinwire.bench.fleet_worker import memory_hash, small_state
from thinwire.bench.net.faults import kind_of
from thinwire.errors import MisuseError, StoreUnavailableError

ROOT = Path(__file__).resolve().parents[2]
SMALL = FleetOptions(
    consumers=12, machines=2, versions=2, state_bytes=16 << 10, poll_s=0.2, share=0.1, server="http", processes=False
)


def test_a_small_fleet_through_a_bad_line_and_what_a_cache_saves(tmp_path: Path) -> None:
    said: list[str] = []
    kept: list[dict] = []
    direct, cached = run_fleet(tmp_path, ["direct", "cache"], SMALL, report=said.append, keep=kept.append)
    assert kept == [direct, cached]
    for row in (direct, cached):
        assert (row["mismatches"], row["missing"]) == (0, 0)
        assert row["notes"] == 12 * 4
        assert 0 <= row["p50_s"] <= row["p99_s"] <= row["max_s"]
        assert len(row["quantiles_s"]) == 101
        assert len(row["ratio_by_version"]) == 2
    assert direct["requests"]["corrupted"] + direct["requests"]["cut"] > 0
    assert direct["requests"]["objects_per_version"] >= 12
    assert cached["requests"]["objects_per_version"] < 8  # two machines; damaged ones are asked for again
    assert cached["requests"]["followed"]["requests"] < direct["requests"]["followed"]["requests"]
    assert "cache: version 4 of 4" in said
    fleet_figure([direct, cached], tmp_path / "figures" / "fleet.png")
    assert (tmp_path / "figures" / "fleet.png").stat().st_size > 10_000
    assert fleet_markdown([direct, cached]).count("\n") == 3
    assert fleet_table([direct, cached]).row_count == 2


def test_a_consumer_that_holds_something_else_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fleet_worker.memory_hash
    lies = iter(["0" * 32])
    monkeypatch.setattr(fleet_worker, "memory_hash", lambda state: next(lies, real(state)))
    options = FleetOptions(
        consumers=2, machines=1, versions=1, state_bytes=16 << 10, poll_s=0.1, share=0.0, server="http",
        processes=False,
    )  # fmt: skip
    (row,) = run_fleet(tmp_path, ["cache"], options)
    assert row["mismatches"] == 1


@pytest.mark.slow
def test_a_machine_that_ends_by_itself_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = FleetOptions(consumers=1, machines=1, versions=1, state_bytes=16 << 10, poll_s=0.1, server="http")
    monkeypatch.setattr(bench.Machine, "write", lambda self: tmp_path / "no such file")
    with pytest.raises(StoreUnavailableError, match="ended by themselves"):
        run_fleet(tmp_path, ["direct"], options)


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    for carriers, options in (
        (["pigeons"], SMALL),
        (["direct"], FleetOptions(consumers=3, machines=2, server="http", processes=False)),
        (["direct"], FleetOptions(consumers=1, machines=2, server="http")),
        (["direct"], FleetOptions(server="ftp")),
    ):
        with pytest.raises(MisuseError):
            run_fleet(tmp_path / str(len(carriers[0]) + options.consumers), carriers, options)


def test_memory_is_hashed_bit_for_bit() -> None:
    state, other = small_state(16 << 10, 1), small_state(16 << 10, 1)
    assert memory_hash(state) == memory_hash(other) != memory_hash(small_state(16 << 10, 2))
    with torch.no_grad():
        other["layers.3.weight"][2, 1] *= -1
    assert memory_hash(state) != memory_hash(other)


def test_requests_are_told_apart() -> None:
    for target, kind in (
        ("/b/run/objects/0000000001-ab/x", "object"),
        ("/b/run/skips/0000000004-0000000002/x", "object"),
        ("/b/run/latest.json", "other"),
        ("/?list=manifests%2F&after=", "list"),
    ):
        assert kind_of("GET", target) == kind
    assert kind_of("PUT", "/b/run/objects/x") == "put"


@pytest.mark.slow
def test_machines_are_processes(tmp_path: Path) -> None:
    options = FleetOptions(consumers=40, machines=4, versions=2, state_bytes=64 << 10, poll_s=1.0, server="http")
    for row in run_fleet(tmp_path, ["direct", "cache", "swarm"], options):
        assert (row["mismatches"], row["missing"]) == (0, 0)


RESULTS = ROOT / "bench" / "results"


def test_the_docs_are_those_of_the_rows() -> None:
    rows = [json.loads(line) for line in (RESULTS / "fleet.jsonl").read_text().splitlines()]
    assert fleet_markdown(rows) in (ROOT / "docs" / "fleet.md").read_text()


@pytest.mark.parametrize("name", ["fleet.jsonl", "fleet-busy.jsonl"])
def test_no_consumer_was_wrong_or_late(name: str) -> None:
    rows = [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
    assert rows
    assert all((row["mismatches"], row["missing"]) == (0, 0) for row in rows)

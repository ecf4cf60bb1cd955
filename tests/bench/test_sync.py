"""Every method of weight sync brings the new state, what is measured adds up, and tables say who is first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from thinwire.bench import sync as bench
from thinwire.bench.net.http_store import HttpServer
from thinwire.bench.net.namespaces import SlowNetwork
from thinwire.bench.sync import SyncOptions, project, read_rows, run_sync, winner
from thinwire.bench.sync_cli import BEGIN, END, app, insert, sync_markdown
from thinwire.bench.sync_methods import NAMES, digest_of, is_ours, receiver, sender
from thinwire.bench.workloads import ulp
from thinwire.errors import MisuseError
from thinwire.stores.local import LocalStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("method", NAMES)
def test_every_method_brings_the_new_state_and_back(tmp_path: Path, method: str) -> None:
    pair = ulp(300_000, 0.02, 1)
    states = (pair.old.copy(), pair.new)
    digests = [digest_of(state, pair.shapes) for state in states]
    with HttpServer(LocalStore(tmp_path, fsync=False)) as server:
        cells = pair.old.copy()
        out = sender(method, tmp_path, server.endpoint, pair)
        into = receiver(method, tmp_path, server.endpoint, cells, pair.shapes)
        for k in range(2):
            size, stages = out.publish(states[k % 2], states[(k + 1) % 2])
            assert 0 < size <= 2 * pair.size
            assert {"encode", "upload"} <= set(stages)
            digest, stages = into.follow(cells)
            assert digest == digests[(k + 1) % 2]
            assert np.array_equal(cells, states[(k + 1) % 2])
            assert {"fetch", "apply", "verify", "pause"} <= set(stages)
        out.close()


def test_deltas_of_thinwire_are_smaller_than_what_others_send(tmp_path: Path) -> None:
    pair, sizes = ulp(1 << 20, 0.01, 2), {}
    with HttpServer(LocalStore(tmp_path, fsync=False)) as server:
        for method in NAMES:
            sizes[method] = sender(method, tmp_path, server.endpoint, pair).publish(pair.old, pair.new)[0]
    assert sizes["full"] == pair.size
    assert max(sizes[m] for m in sizes if is_ours(m)) < min(sizes[m] for m in sizes if not is_ours(m))


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="methods are"):
        sender("pigeons", tmp_path, "http://127.0.0.1:1", ulp(300_000, 0.02, 1))
    for wrong in ({"methods": ("pigeons",)}, {"rounds": 3}, {"workload": "none"}, {"links": ("fast",)}):
        with pytest.raises(MisuseError):
            run_sync(SyncOptions(**wrong), None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_over_loopback_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["--size", "1MiB", "--links", "loopback", "--rounds", "2", "--workers", "1", "-o", str(out)]
    first = CliRunner().invoke(app, [*words, "--densities", "0.01", "--methods", "full,small"])
    assert first.exit_code == 0, first.output
    rows = read_rows(out)
    assert [row["method"] for row in rows] == ["full", "small"]
    before = out.read_text()
    again = CliRunner().invoke(app, [*words, "--densities", "0.01,0.05", "--methods", "full,small,coo", "--json"])
    assert again.exit_code == 0, again.output
    assert out.read_text().startswith(before)
    found = read_rows(out)
    assert [(row["method"], row["density"]) for row in found[2:]] == [("coo", 0.01), ("small", 0.05), ("coo", 0.05)]
    for row in found:
        assert row["verified"]
        assert row["line_sent_bytes"] is None
        assert 0 < row["pause_s"] < row["seconds"]
        assert row["seconds"] in row["rounds_s"]
        assert all(0 <= seconds <= row["seconds"] for seconds in row["stages_s"].values())


@pytest.mark.net
@pytest.mark.skipif(SlowNetwork.why_not() is not None, reason=f"no slow network here: {SlowNetwork.why_not()}")
def test_a_run_over_a_limited_line_with_delay_and_loss(tmp_path: Path) -> None:
    options = SyncOptions(8 << 20, (0.01,), ("100mbit",), ("full", "small"), workers=2)
    full, small = run_sync(options, None)
    assert 8 * full["bytes"] / 100e6 * 2 * 0.8 < full["seconds"]  # up and down at the line's rate
    assert full["bytes"] <= full["line_sent_bytes"] < 1.15 * full["bytes"]
    assert small["line_received_bytes"] < full["line_received_bytes"] / 20
    far = SyncOptions(1 << 20, (0.01,), ("100mbit",), ("small",), delay_s=0.05, loss=0.01)
    (row,) = run_sync(far, None)
    assert row["seconds"] > 0.4  # several round trips of 0.1 s each


def made(**changes: object) -> dict:
    row = {
        "bench": "sync", "method": "small", "ours": True, "density": 0.01, "link": "1gbit", "size": 1 << 30,
        "workload": "ulp", "workers": 2, "delay_s": 0.0, "loss": 0.0, "seed": 0, "rounds": 2, "seconds": 1.0,
        "stages_s": {"encode": 0.2, "upload": 0.15, "fetch": 0.15, "apply": 0.2, "verify": 0.1}, "pause_s": 0.3,
        "bytes": 10_000_000, "projected": False, "date": "2026-11-21",
    }  # fmt: skip
    return {**row, **changes}


def test_a_projection_grows_with_the_state_and_is_marked() -> None:
    (row,) = project([made(), made(density=0.05), made(size=1 << 20)], 14 << 30, 0.01)
    assert row["projected"]
    assert row["projected_from"] == 1 << 30
    assert not row["verified"]
    assert row["bytes"] == 140_000_000
    # work times 14; bytes at 1 Gbit/s and what was above it; 0.2 s of waiting once
    assert row["stages_s"]["encode"] == pytest.approx(2.8)
    assert row["stages_s"]["upload"] == pytest.approx(14 * 0.08 + 0.07)
    assert row["seconds"] == pytest.approx(sum(row["stages_s"].values()) + 0.2, abs=0.01)
    (free,) = project([made(link="none")], 14 << 30, 0.01)
    assert free["stages_s"]["upload"] == pytest.approx(14 * 0.15)
    assert project([], 1, 0.01) == []


def test_tables_name_the_first_and_say_where_thinwire_is_not(tmp_path: Path) -> None:
    slow = made(method="full", ours=False, seconds=9.0, bytes=1 << 30, density=0.002)
    peer = made(method="coo", ours=False, seconds=0.9, stages_s={**made()["stages_s"], "apply": 0.05})
    text = sync_markdown([made(), slow])
    assert "| thinwire small | **1.00** (300) | 10.0 |" in text
    assert "full checkpoint | 9.00 (300) | 1,073.7 |" in text
    assert "first in every cell" in text
    text = sync_markdown([made(), slow, peer])
    assert "| COO, int32 + bf16 (verl, vLLM) | **0.90** (300) |" in text
    assert "is first by 100 ms before thinwire small; most of it is apply (200 against 50 ms)" in text
    assert winner([made(), peer]) is peer
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    insert(text, page)
    assert page.read_text() == f"before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(MisuseError, match="put both"):
        insert(text, page)


def test_who_may_not_make_networks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowNetwork, "why_not", staticmethod(lambda: "no root"))
    result = CliRunner().invoke(app, ["--size", "1MiB"])
    assert result.exit_code == 0
    assert "skipped: no root" in result.output


def test_a_folder_in_memory_is_taken_only_if_there_is_room() -> None:
    assert bench._place(SyncOptions(size=1 << 60)) is None


RESULTS = sorted((ROOT / "bench" / "results").glob("sync-*.jsonl"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_the_docs_are_those_of_the_rows(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["verified"] for row in rows)
    page = (ROOT / "docs" / "fleet.md").read_text()
    if f"Rows: `{path.name}`" in page:
        shown = [rows, rows + project(rows, 14_000_000_000, 0.01)]
        assert any(sync_markdown(each) in page for each in shown)

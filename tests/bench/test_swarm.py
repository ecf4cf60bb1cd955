"""The benchmarks of peers say what was measured; a small swarm on a slow network spares the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.tools import thinwire
from thinwire.bench.carriers import carriers_markdown, run_carriers
from thinwire.bench.net.namespaces import SlowNetwork
from thinwire.bench.swarm import _row, run_swarm
from thinwire.bench.swarm_cli import swarm_markdown, swarm_table
from thinwire.errors import MisuseError


def host(tx: int, **rest: object) -> list[dict]:
    return [{"line": {"rx": 0, "tx": tx}, **rest}]


def test_a_row_adds_up_what_hosts_say() -> None:
    trainer = host(250, began=10.0, published=10.5, digest="d", payload_bytes=100, uploaded_bytes=120)
    followers = [
        host(40, verified=12.0, digest="d"),
        host(60, verified=11.0, digest="d"),
        host(0, verified=14.0, digest="x"),
    ]
    row = _row("swarm", 0, [host(300), trainer, *followers])
    assert (row["store_sent"], row["trainer_seeded"], row["consumers_sent_max"]) == (3.0, 1.3, 0.6)
    assert (row["first_s"], row["median_s"], row["last_s"], row["mismatches"]) == (1.0, 2.0, 4.0, 1)
    table = swarm_markdown([row])
    assert table.splitlines()[-1] == "| anchor, 0.0 MB | swarm | 3.00 | 1.30 | 0.60 | 2.0 | 4.0 |"
    assert "1" in str(swarm_table([{**row, "rate": "1gbit"}]).caption)


def test_misuse() -> None:
    with pytest.raises(MisuseError, match="store, swarm"):
        run_swarm(ways=["pigeons"])


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowNetwork, "why_not", staticmethod(lambda: "making network namespaces needs root"))
    assert "skipped" in thinwire("bench", "swarm").out


def test_carriers_are_timed_beside_a_copy(tmp_path: Path) -> None:
    pytest.importorskip("libtorrent")
    rows = run_carriers(1 << 20, 1, ways=["a copy in memory", "swarm (TCP)"])
    assert [row["way"] for row in rows] == ["a copy in memory", "swarm (TCP)"]
    assert all(len(row["runs_s"]) == 1 and row["median_gb_s"] > 0 for row in rows)
    assert carriers_markdown(rows).count("\n") == 3


@pytest.mark.net
@pytest.mark.skipif(SlowNetwork.why_not() is not None, reason="no slow network here")
def test_a_swarm_spares_the_store_over_a_real_slow_network() -> None:
    rows = run_swarm(consumers=4, model_bytes=4 << 20, densities=[0.3], ways=["store", "swarm"])
    assert all(row["mismatches"] == 0 for row in rows)
    sent = {(row["way"], row["kind"]): row["store_sent"] for row in rows}
    assert sent["store", "anchor"] > 3.9  # a payload for each
    assert sent["swarm", "anchor"] < 2


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
DOCS = (ROOT / "docs" / "peers.md").read_text()


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def test_the_table_of_the_swarm_is_that_of_the_rows() -> None:
    found = rows("swarm-16x100mbit.jsonl")
    assert swarm_markdown(found) in DOCS
    assert all(row["mismatches"] == 0 and row["consumers"] == 16 for row in found)
    swarmed = [row for row in found if row["way"] == "swarm"]
    assert all(row["store_sent"] <= 3 for row in swarmed)


def test_the_table_of_carriers_is_that_of_the_rows() -> None:
    assert carriers_markdown(rows("carriers.jsonl")) in DOCS

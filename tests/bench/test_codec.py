"""The codec benchmark end to end at a tiny size. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from thinwire.bench.cli import app
from thinwire.bench.measure import Stopwatch, extra_memory, parse_size
from thinwire.bench.peers import PEERS
from thinwire.errors import MisuseError


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("codec")
    args = ["codec", "--size", "1MiB", "--repeats", "1", "--json", "--out", str(folder / "rows.jsonl")]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert printed == [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return printed


def codec_rows(rows: list[dict], workload: str) -> dict[str, dict]:
    return {r["codec"]: r for r in rows if r["bench"] == "codec" and r["workload"]["name"] == workload}


@pytest.mark.parametrize("workload", ["ulp", "adam"])
def test_every_codec_has_a_verified_row(rows: list[dict], workload: str) -> None:
    found = codec_rows(rows, workload)
    ours = {"thinwire fast", "thinwire small", "thinwire small, absolute", "thinwire smallest"}
    assert set(found) == ours | {peer.name for peer in PEERS} | {"zstd --patch-from"}
    for row in found.values():
        assert row["verified"] is True
        assert row["bytes_per_changed"] == pytest.approx(row["patch_bytes"] / row["changed"], rel=1e-4)
        assert row["workload"]["simulated"] is True
        assert row["versions"]["thinwire"]
        assert row["machine"]["cores"] >= 1


def test_sizes_are_in_the_order_that_theory_gives(rows: list[dict]) -> None:
    found = codec_rows(rows, "adam")
    size = {name: row["bytes_per_changed"] for name, row in found.items()}
    assert size["thinwire smallest"] < size["thinwire small"] < size["thinwire small, absolute"] < size["COO"]
    assert size["COO"] == 6
    assert size["thinwire small"] > found["thinwire small"]["entropy"]["plain"] * 0.98
    assert size["copy"] == pytest.approx(2 / found["copy"]["density"], rel=1e-4)


def test_a_digest_costs_the_peers_something(rows: list[dict]) -> None:
    for row in codec_rows(rows, "ulp").values():
        plain, proved = row["apply"]["best_gib_s"], row["apply"]["best_gib_s_with_digest"]
        if row["computes_digest"]:
            assert proved == pytest.approx(plain, rel=0.01)
        else:
            assert proved < plain


def test_stages_are_reported(rows: list[dict]) -> None:
    stages = [row for row in rows if row["bench"] == "stages"]
    assert len(stages) == 2
    assert {"hash", "diff", "encode gaps", "decode gaps", "swap"} <= set(stages[0]["seconds_per_gib"])


def test_whole_calls_through_a_folder_are_verified(rows: list[dict]) -> None:
    whole = [row for row in rows if row["bench"] == "end to end"]
    assert [row["codec"] for row in whole] == ["thinwire small", "thinwire smallest"] * 2
    assert all(row["verified"] and row["publish"]["runs"] == row["apply"]["runs"] == 1 for row in whole)


def test_figures_are_drawn(rows: list[dict], tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    from thinwire.bench.report import codec_figure, codec_html

    some = [row for row in rows if row["workload"]["name"] == "adam"]
    codec_figure(some, tmp_path / "figure.png")
    codec_html(some, tmp_path / "figure.html")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "thinwire smallest" in (tmp_path / "figure.html").read_text()


def test_an_unknown_workload_is_misuse() -> None:
    done = CliRunner().invoke(app, ["codec", "--workload", "dreams"])
    assert isinstance(done.exception, MisuseError)


@pytest.mark.parametrize("text", ["", "GiB", "12 apples", "1TiBB"])
def test_sizes_that_are_none_are_misuse(text: str) -> None:
    with pytest.raises(MisuseError):
        parse_size(text)


def test_extra_memory_sees_what_was_allocated_and_freed() -> None:
    found = extra_memory(lambda: bytearray(b"x") * (64 << 20))
    if found is None:
        pytest.skip("this system does not tell")
    assert 60 << 20 < found < 80 << 20


def test_a_stopwatch_keeps_best_and_median() -> None:
    watch = Stopwatch()
    for _ in range(3):
        with watch():
            sum(range(1000))
    timing = watch.timing()
    assert timing.best <= timing.median <= max(timing.runs)
    assert timing.row(1 << 30)["runs"] == 3

"""Which level pays on which link: the arithmetic, from rows that are kept, and that level="auto" decides alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from thinwire.bench.cli import app
from thinwire.bench.link import FULL, LINKS, Way, link_rows, link_table, link_text, pays
from thinwire.errors import MisuseError
from thinwire.sync.levels import CANDIDATES, LevelChooser

ROWS = Path(__file__).parents[2] / "bench" / "results" / "codec-1gib.jsonl"

ways = st.lists(st.tuples(st.floats(1e-3, 100), st.integers(1, 10**10)), min_size=1, max_size=6).map(
    lambda pairs: [Way(str(k), work, size) for k, (work, size) in enumerate(pairs)]
)


@given(ways, st.floats(6.01, 11.99))
def test_what_pays_is_the_least_on_every_link(ways: list[Way], exponent: float) -> None:
    rate = 10**exponent
    found = pays(ways)
    assert found[0][0] == 1e6
    assert [start for start, _ in found] == sorted(start for start, _ in found)
    chosen = next(way for start, way in reversed(found) if start <= rate)
    assert chosen.seconds(rate) <= min(way.seconds(rate) for way in ways) * (1 + 1e-9)


def kept() -> list[dict[str, object]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def test_rows_of_codecs_become_ways() -> None:
    rows = link_rows(kept())
    assert {row["workload"] for row in rows} == {"ulp", "adam"}
    assert {"thinwire fast", "thinwire small", "thinwire smallest", FULL} <= {row["codec"] for row in rows}
    for row in rows:
        for rate in LINKS:
            expected = row["work_s"] + 8 * row["bytes"] / rate
            assert row["seconds"][f"{rate:g}"] == pytest.approx(expected, abs=2e-6)
    adam = [row for row in rows if row["workload"] == "adam"]
    assert "thinwire" in link_text(adam)
    assert link_table(adam).row_count == len(adam)
    with pytest.raises(MisuseError):
        link_rows([{"bench": "stages"}])


@pytest.mark.parametrize("rate", LINKS)
def test_auto_chooses_what_the_table_says(rate: float) -> None:
    """Fed with half of the work and of the bytes, because a chooser knows one side."""
    rows = [row for row in link_rows(kept()) if row["workload"] == "adam"]
    of = {level: next(row for row in rows if row["codec"] == f"thinwire {level}") for level in CANDIDATES}
    chooser = LevelChooser(rate)
    for level in CANDIDATES * 2:
        row = of[level]
        chooser.encoded(
            level,
            state_bytes=row["state_bytes"],
            changed=1000,
            patch_bytes=row["bytes"] // 2,
            seconds=row["work_s"] / 2,
        )
    assert of[chooser.choose()]["seconds"][f"{rate:g}"] == pytest.approx(
        min(row["seconds"][f"{rate:g}"] for row in of.values()), rel=1e-3
    )


def test_the_command_reads_rows_and_draws(tmp_path: Path) -> None:
    ran = CliRunner().invoke(
        app, ["link", "--rows", str(ROWS), "--figures", str(tmp_path), "--out", str(tmp_path / "link.jsonl"), "--json"]
    )
    assert ran.exit_code == 0, ran.output
    assert len(list(tmp_path.glob("link-*.png"))) == 2
    assert len((tmp_path / "link.jsonl").read_text().splitlines()) == len(link_rows(kept()))


def test_the_command_measures_when_it_has_no_rows() -> None:
    ran = CliRunner().invoke(app, ["link", "--size", "2MiB", "--densities", "0.01", "--repeats", "1", "--json"])
    assert ran.exit_code == 0, ran.output
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert {row["codec"] for row in found} >= {"thinwire fast", FULL}
    assert CliRunner().invoke(app, ["link", "--densities", "much"]).exit_code != 0
    assert CliRunner().invoke(app, ["link", "--workload", "none"]).exit_code != 0

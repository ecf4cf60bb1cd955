"""``thinwire bench instruments`` at sizes of seconds: every part makes its rows, and its counts and ranks are right."""

from __future__ import annotations

import pytest

from thinwire.bench.instruments import PARTS, InstrumentOptions, run_instruments
from thinwire.bench.instruments_cli import instruments_markdown, instruments_tables
from thinwire.errors import MisuseError

SMALL = InstrumentOptions(
    elements=1 << 16, width=64, layers=1, shapes=((2, 16),), null_steps=10, matrices=((96, 64),), repeats=2
)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_measures_what_it_says(part: str) -> None:
    rows = run_instruments((part,), SMALL)
    assert "machine" in rows[0]
    assert len(instruments_tables(rows)) == len(PARTS[part])
    for name in {row["part"] for row in rows}:
        assert instruments_markdown(rows, name).count("\n") >= 2
    for row in rows:
        if row["part"] == "overhead":
            assert row["changed"] == pytest.approx(row["changed_exactly"], rel=0.02)
            assert row["bytes_per_parameter"] >= 1
        elif row["part"] == "null, first step":
            assert abs(row["null_with_sizes"] - row["observed"]) < 0.01
        elif row["part"] == "null, later steps":
            assert 0 <= row["null"] <= 1
        elif row["part"] == "rank":
            assert row["error"] < 0.02
        else:
            assert row["gb_s"] > 0


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(MisuseError, match="there are compare"):
        run_instruments(("speed",))

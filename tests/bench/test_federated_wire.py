"""The bench of update sizes compares before it notes, and its floor is one."""

from __future__ import annotations

import pytest

from thinwire.bench.federated_wire import floor_bytes, wire_rows
from thinwire.federated import frame as frames


def test_rows_hold_what_was_encoded():
    rows = wire_rows([50_000], [0.01, 1.0], ["float32", "float16"])
    assert [row["values"] for row in rows] == ["float32", "float16"] * 2
    for row in rows:
        assert row["bytes_per_element"] == row["nbytes"] / 50_000
        assert 0.6 < row["of_floor"] < 1.1
    assert floor_bytes(1.0, 4) == 4


def test_nothing_is_noted_that_decodes_wrongly(monkeypatch):
    monkeypatch.setattr(frames, "rounded", lambda values, name: values + 1)
    with pytest.raises(AssertionError):
        wire_rows([1000], [0.1], ["float16"])

"""Rows survive a crash up to the last whole step, and come back from every kind of file as they were."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MalformedError, MisuseError
from thinwire.probe.history import COLUMNS, History, load_history, read_log
from thinwire.probe.plots import history_figure
from thinwire.probe.tracker import SparsityTracker


def run(steps: int, **options: object) -> SparsityTracker:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tracker = SparsityTracker(model, optimizer=optimizer, lags=(1, 2), null=True, **options)  # type: ignore[arg-type]
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype)
        optimizer.step()
        tracker.step(step)
    return tracker


def test_rows_are_the_same_from_memory_log_and_parquet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    memory = run(6)
    torch.manual_seed(0)
    logged = run(6, log=tmp_path / "log.jsonl")
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in memory.history.rows()]
    assert len(rows) == 6 * 8 + 3 * 8  # all, three kinds, four tensors
    memory.save(tmp_path / "a.parquet")
    logged.save(tmp_path / "b.parquet")
    memory.save(tmp_path / "c.jsonl")
    for name in ("log.jsonl", "a.parquet", "b.parquet", "c.jsonl"):
        found = load_history(tmp_path / name)
        assert tuple(found[0]) == COLUMNS
        assert [{k: v for k, v in row.items() if k != "seconds"} for row in found] == rows
    whole = [row for row in rows if row["scope"] == "all" and row["lag"] == 1]
    parts = [row for row in rows if row["scope"] == "kind" and row["lag"] == 1]
    for row in whole:
        own = [part for part in parts if part["step"] == row["step"]]
        assert sum(part["changed"] for part in own) == row["changed"]
        null = sum(part["null"] * part["elements"] for part in own) / row["elements"]
        assert null == pytest.approx(row["null"])
        assert row["excess_low"] <= row["excess"] <= row["excess_high"]
    assert not list(tmp_path.glob(".*"))


@given(cut=st.integers(1, 400))
def test_a_log_that_was_cut_off_is_read_up_to_its_last_whole_step(cut: int) -> None:
    path = Path("log.jsonl")
    path.unlink(missing_ok=True)
    history = History(path)
    sizes = []
    for step in range(4):
        history.append(
            step, [{"scope": "all", "name": "x", "lag": 1, "elements": 9, "changed": step, "density": math.nan}]
        )
        sizes.append(path.stat().st_size)
    data = path.read_bytes()
    kept = max(0, len(data) - cut)
    path.write_bytes(data[:kept])
    whole = sum(size <= kept for size in sizes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = list(read_log(path))
    assert [row["step"] for row in rows] == list(range(whole))
    dropped = kept - (sizes[whole - 1] if whole else 0)
    assert len(caught) == (dropped > 0)
    if dropped:
        assert f"last {dropped} bytes" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = History(path)
    again.append(9, [{"scope": "all", "lag": 1}])  # the next line starts on a line of its own
    assert [row["step"] for row in read_log(path)] == [*range(whole), 9]


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    history = History(path)
    for step in range(3):
        history.append(step, [{"scope": "all", "lag": 1, "changed": step}])
    data = bytearray(path.read_bytes())
    data[12] ^= 1
    path.write_bytes(bytes(data))
    for use in (lambda: list(read_log(path)), lambda: History(path)):
        with pytest.raises(MalformedError, match="byte 0"):
            use()


def test_what_holds_no_history_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(MalformedError):
        load_history(tmp_path / "x.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "y.parquet")
    with pytest.raises(MalformedError, match="columns"):
        load_history(tmp_path / "y.parquet")
    with pytest.raises(MisuseError, match="nothing to draw"):
        history_figure([], tmp_path / "z.png")
    empty = History()
    empty.save(tmp_path / "empty.parquet")
    assert load_history(tmp_path / "empty.parquet") == []


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_figures_of_every_kind_of_run(tmp_path: Path, suffix: str) -> None:
    tracker = run(4)
    tracker.plot(tmp_path / f"null{suffix}")
    history_figure(list(tracker.history.rows()), tmp_path / f"two{suffix}", lag=2)
    named = {"w": torch.ones(5)}
    plain = SparsityTracker(named, mode="fast")
    plain.step()
    plain.plot(tmp_path / f"plain{suffix}")
    assert len({p.stat().st_size for p in tmp_path.iterdir()}) == 3
    with pytest.raises(MisuseError, match="lag 7"):
        history_figure(list(tracker.history.rows()), tmp_path / "no.png", lag=7)

"""The workers of a run side by side: what each loses, counts for and gets done, as a table or a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.bar import Bar
from rich.table import Table

__all__ = ["WorkerRow", "workers_line", "workers_table"]

_BAR_CELLS = 24


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker in one step. ``weight`` is its share in the gradient that was applied (all shares come to 1),
    ``signal`` what that was decided by, ``rate`` samples or tokens a second."""

    rank: int
    loss: float
    weight: float
    rate: float
    signal: float | None = None


def workers_table(rows: Sequence[WorkerRow], unit: str) -> Table:
    """A line a worker; the bar of a worker that counts as much as all others on average is half full."""
    table = Table(box=None, pad_edge=False)
    for name in ("worker", "loss", "signal"):
        table.add_column(name, justify="right")
    table.add_column("weight")
    table.add_column("", justify="right")
    table.add_column(f"{unit}/s", justify="right")
    full = max([2 / max(1, len(rows)), *(row.weight for row in rows)])
    for row in rows:
        bar = Bar(size=full, begin=0, end=row.weight, width=_BAR_CELLS)
        table.add_row(
            str(row.rank), f"{row.loss:.4f}", _signal(row), bar, f"{100 * row.weight:.1f} %", f"{row.rate:,.0f}"
        )
    return table


def workers_line(rows: Sequence[WorkerRow]) -> str:
    """The same in one line, for logs.

    >>> workers_line([WorkerRow(0, 2.5, 0.75, 1000.0, signal=2.4), WorkerRow(1, 4.0, 0.25, 900.0)])
    'worker 0: loss 2.5000, signal 2.4, weight 75.0 %  worker 1: loss 4.0000, weight 25.0 %'
    """
    return "  ".join(
        f"worker {row.rank}: loss {row.loss:.4f}, "
        + (f"signal {_signal(row)}, " if row.signal is not None else "")
        + f"weight {100 * row.weight:.1f} %"
        for row in rows
    )


def _signal(row: WorkerRow) -> str:
    return "-" if row.signal is None else f"{row.signal:.4g}"

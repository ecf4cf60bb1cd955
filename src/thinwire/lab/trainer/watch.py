"""The workers of a run side by side: what each loses, counts for and gets done, as a table or a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.bar import Bar
from rich.table import Table

__all__ = ["WorkerRow", "workers_line", "workers_table"]

_BAR_CELLS = 24


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker in one step. ``weight`` is its share in the gradient that was applied (all shares come to 1),
    ``signals`` what that was decided by, ``rate`` samples or tokens a second."""

    rank: int
    loss: float
    weight: float
    rate: float
    signals: Mapping[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Plain values for a log.

        >>> WorkerRow(3, 2.5, 0.25, 1000.0, {"loss_ema": 2.4}).values()
        {'loss_3': 2.5, 'weight_3': 0.25, 'loss_ema_3': 2.4}
        """
        return {f"{name}_{self.rank}": x for name, x in [("loss", self.loss), ("weight", self.weight),
                                                         *self.signals.items()]}  # fmt: skip


def workers_table(rows: Sequence[WorkerRow], unit: str) -> Table:
    """A line a worker; the bar of a worker that counts as much as all others on average is half full."""
    table = Table(box=None, pad_edge=False)
    names = list(dict.fromkeys(name for row in rows for name in row.signals))
    for name in ("worker", "loss", *names):
        table.add_column(name, justify="right")
    table.add_column("weight")
    table.add_column("", justify="right")
    table.add_column(f"{unit}/s", justify="right")
    full = max([2 / max(1, len(rows)), *(row.weight for row in rows)])
    for row in rows:
        signals = [f"{row.signals[name]:.4g}" if name in row.signals else "-" for name in names]
        bar = Bar(size=full, begin=0, end=row.weight, width=_BAR_CELLS)
        share, rate = f"{100 * row.weight:.1f} %", f"{row.rate:,.0f}"
        table.add_row(str(row.rank), f"{row.loss:.4f}", *signals, bar, share, rate)
    return table


def workers_line(rows: Sequence[WorkerRow]) -> str:
    """The same in one line, for logs.

    >>> workers_line([WorkerRow(0, 2.5, 0.75, 1000.0, {"loss_ema": 2.4}), WorkerRow(1, 4.0, 0.25, 900.0)])
    'worker 0: loss 2.5000, loss_ema 2.4, weight 75.0 %  worker 1: loss 4.0000, weight 25.0 %'
    """
    return "  ".join(
        f"worker {row.rank}: loss {row.loss:.4f}, "
        + "".join(f"{name} {value:.4g}, " for name, value in row.signals.items())
        + f"weight {100 * row.weight:.1f} %"
        for row in rows
    )

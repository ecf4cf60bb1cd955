"""Gradient exchange side by side: seconds and bytes of every method over the same slow network, in one run.

Each worker is a process on a host of its own (:mod:`thinwire.bench.net`). The time of a step is that of the slowest
rank from a common barrier, where gradients are ready, until the average is in its buffers: selection, encoding, wire
and decoding. The bytes are those that came in through the host's line. All workers share this machine's cores, so what
a method computes weighs more than it would on hosts of their own; ``cpu_s`` says how much it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from rich.table import Table

from thinwire.bench.gradients_methods import METHODS
from thinwire.bench.gradients_worker import CHECKED, GradientOptions
from thinwire.bench.gradients_workload import CORRELATION
from thinwire.bench.measure import load, machine, versions
from thinwire.bench.net.launch import launch
from thinwire.bench.net.namespaces import SlowNetwork, parse_rate
from thinwire.errors import ThinwireError

__all__ = ["WrongResultError", "gradients_markdown", "gradients_table", "run_gradients"]

Row = dict[str, Any]
_FLOAT = 4


class WrongResultError(ThinwireError):
    """A method's result differs between ranks or from what its law says; no time is reported for it."""


def run_gradients(
    options: GradientOptions,
    workers: int,
    rate: str | None,
    *,
    report: Callable[[str], None] = lambda _: None,
    timeout_s: float = 3600.0,
) -> list[Row]:
    """One row a method. ``rate`` None: over loopback, which has no limit and counts everybody's bytes as one.

    Raises:
        MisuseError: No slow network can be made here, or options that do not fit.
        RankError: A rank failed.
        WrongResultError: A method did not compute what it should.
    """
    network = nullcontext(None) if rate is None else SlowNetwork(workers, rate)
    began = load()
    with network as line:
        results = launch(
            "thinwire.bench.gradients_worker", [options.dumps()],
            ranks=workers, network=line, timeout_s=timeout_s, report=report,
            env={"CUDA_VISIBLE_DEVICES": ""},  # PyTorch's PowerSGD hook takes CPU tensors for CUDA's where there is any
        )  # fmt: skip
    common = {
        "bench": "gradients",
        "workers": workers,
        "rate": rate,
        "options": asdict(options) | {"correlation": CORRELATION, "checked_positions": CHECKED},
        "load_before": began,
        "load_after": load(),
        "machine": machine(),
        "package_versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return [common | summarise(ranks, rate) for ranks in zip(*results, strict=True)]


def summarise(ranks: Sequence[Row], rate: str | None) -> Row:
    """What the ranks report of one method, as one row.

    Raises:
        WrongResultError: Ranks hold different bits, or the law of the method does not hold.
    """
    first, title = ranks[0], METHODS[ranks[0]["method"]].title
    if any(rank["digests"] != first["digests"] for rank in ranks):
        raise WrongResultError(f"{title}: the ranks hold different results", method=first["method"])
    errors = [rank["checks"]["error"] for rank in ranks]
    error = next((error for error in errors if not error <= 1), max(errors))
    if not error <= 1:  # NaN, too
        law = first["checks"]["law"]
        raise WrongResultError(f"{title}: {law} is off by {error:.3g} times what rounding allows", error=error)
    workers, numel = len(ranks), first["numel"]
    slowest = [max(step["seconds"] for step in steps) for steps in zip(*(rank["steps"] for rank in ranks), strict=True)]

    def mean(key: str) -> float | None:
        values = [step[key] for rank in ranks for step in rank["steps"]]
        return None if None in values else fmean(values)

    dense = 2 * (workers - 1) / workers * _FLOAT * numel
    bits_per_s = parse_rate(rate) if rate is not None else None
    received = mean("received")
    return {
        "method": first["method"],
        "title": title,
        "numel": numel,
        "buckets": first["buckets"],
        "seconds": slowest,
        "median_s": median(slowest),
        "best_s": min(slowest),
        "cpu_s": mean("cpu_s"),
        "received_bytes": received,
        "received_bytes_max": None
        if received is None
        else max(fmean(s["received"] for s in r["steps"]) for r in ranks),
        "sent_bytes": mean("sent"),
        "accounted_bytes": mean("own"),
        "theory_bytes": first["theory_bytes"],
        "theory_s": first["theory_bytes"] * 8 / bits_per_s if bits_per_s else None,
        "dense_bytes": dense,
        "share_of_dense": received / dense if received is not None and dense else None,
        "law": first["checks"]["law"],
        "law_error": error,
        "bit_identical": True,
    }


# --- what is shown -----------------------------------------------------------------------------------------------

_HEADINGS = (
    "method", "median ms", "best", "theory", "x fp32", "x fp16", "received MB", "accounted", "theory", "% fp32",
    "CPU ms",
)  # fmt: skip


def _megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.3f}" if value < 1e6 else f"{value / 1e6:.4g}"


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{1e3 * value:.1f}" if value < 0.1 else f"{1e3 * value:.0f}"


def _cells(row: Row, by_name: dict[str, Row]) -> list[str]:
    def gain(than: str) -> str:
        return f"{by_name[than]['median_s'] / row['median_s']:.1f}" if than in by_name else "–"

    share = row["share_of_dense"]
    return [
        row["title"],
        _milliseconds(row["median_s"]),
        _milliseconds(row["best_s"]),
        _milliseconds(row["theory_s"]),
        gain("fp32") if row["method"] != "noop" else "–",
        gain("fp16") if row["method"] != "noop" else "–",
        _megabytes(row["received_bytes"]),
        _megabytes(row["accounted_bytes"]),
        _megabytes(row["theory_bytes"]),
        "–" if share is None else f"{100 * share:.2f}",
        _milliseconds(row["cpu_s"]),
    ]


def _title(row: Row) -> str:
    rates = {None: "loopback, no limit", "none": "no limit"}
    rate = rates.get(row["rate"], f"{row['rate']} a worker, both ways")
    options = row["options"]
    network = "ResNet-50" if options["width"] == 64 else f"ResNet-50 of width {options['width']}"
    return (
        f"{network}'s {row['numel']:,} gradients, {row['workers']} workers, {rate}, density {options['density']:.3g}, "
        f"{'one flat tensor' if len(row['buckets']) == 1 else str(len(row['buckets'])) + ' buckets'}"
    )


def gradients_table(rows: Sequence[Row]) -> Table:
    """One line a method."""
    table = Table(title=_title(rows[0]), title_justify="left", caption_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    by_name = {row["method"]: row for row in rows}
    for row in rows:
        table.add_row(*_cells(row, by_name), style="bold" if METHODS[row["method"]].ours else "")
    first = rows[0]
    table.caption = (
        "Time of the slowest rank from 'gradients are ready' to 'average in the buffers'; "
        f"{first['options']['repeats']} repeats after {first['options']['verified_steps']} verified steps. Received: "
        "through the line, per worker and step; accounted: by the method itself; theory: arithmetic, and its time at "
        f"line rate. CPU: per rank and step; {first['workers']} ranks share {first['machine']['cores']} cores. Load "
        f"{first['load_before']} to {first['load_after']}. Synthetic gradients: heavy-tailed, new in each step, "
        f"correlation {first['options']['correlation']} between workers."
    )
    return table


def gradients_markdown(rows: Sequence[Row]) -> str:
    """The same table for the docs."""
    by_name = {row["method"]: row for row in rows}
    lines = [list(_HEADINGS), ["---", *["---:"] * (len(_HEADINGS) - 1)]]
    for row in rows:
        cells = _cells(row, by_name)
        lines.append([f"**{cells[0]}**" if METHODS[row["method"]].ours else cells[0], *cells[1:]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

"""Weight sync side by side: from ``publish()`` until every worker has proved the new version, over limited lines.

A trainer, a store and workers, each a process on a host of its own; trainer and workers are behind lines of the given
rate, the store's own line has no limit, as that of an object store which many share. Every method uploads to the same
store, is looked for in the same way (every 20 ms), and ends when every worker has computed the same digest over the
whole state in its memory. Methods of others have no such proof; its seconds are told apart (``verify``).

The two states are made in every process from one seed, and travel to and fro: the first round's new version is the
second round's old one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.bench.measure import load, machine, versions
from thinwire.bench.net.launch import launch
from thinwire.bench.net.namespaces import SlowNetwork, parse_rate
from thinwire.bench.sync_methods import NAMES, is_ours
from thinwire.bench.sync_worker import SyncTask
from thinwire.bench.workloads import WORKLOADS
from thinwire.errors import MisuseError

__all__ = ["LOOPBACK", "SyncOptions", "project", "read_rows", "run_sync", "winner"]

Report = Callable[[str], None]
Row = dict[str, Any]

LOOPBACK = "loopback"
"""A line that is none: no root is needed, no rate is limited, and no bytes are counted on it."""

_STAGES = ("encode", "upload", "fetch", "apply", "verify")
_ROOM = 6  # states that the store's folder may have to hold, about


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """What is run: every method at every density over every line. ``links`` as in ``SlowNetwork``, or ``loopback``."""

    size: int = 1 << 30
    densities: tuple[float, ...] = (0.002, 0.01, 0.05)
    links: tuple[str, ...] = ("100mbit", "1gbit", "none")
    methods: tuple[str, ...] = ("full", "coo", "coo-zstd", "gaps-zstd", "xor-zstd", "fast", "small", "smallest")
    workload: str = "ulp"
    rounds: int = 2
    workers: int = 2
    seed: int = 0
    delay_s: float = 0.0
    loss: float = 0.0
    timeout_s: float = 7200.0


def _check(options: SyncOptions) -> None:
    if not set(options.methods) <= set(NAMES) or options.workload not in WORKLOADS:
        raise MisuseError(f"methods are {', '.join(NAMES)}; workloads {', '.join(WORKLOADS)}")
    if options.rounds < 2 or options.rounds % 2:
        raise MisuseError("rounds go to and fro: give an even number of them, at least 2")
    for link in options.links:
        if link != LOOPBACK:
            parse_rate(link)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _key(row: Row) -> tuple[Any, ...]:
    """What makes two rows the same measurement. Full checkpoints do not depend on how much has changed."""
    density = None if row["method"] == "full" else row["density"]
    names = ("method", "size", "link", "workload", "workers", "delay_s", "loss", "seed")
    return (density, *(row[name] for name in names))


def _cells(options: SyncOptions) -> list[Row]:
    facts = {
        "size": options.size, "workload": options.workload, "workers": options.workers,
        "delay_s": options.delay_s, "loss": options.loss, "seed": options.seed,
    }  # fmt: skip
    return [
        {"method": method, "density": density, "link": link, **facts}
        for link in options.links
        for density in options.densities
        for method in options.methods
    ]


def run_sync(options: SyncOptions, out: Path | None, *, report: Report = lambda _: None) -> list[Row]:
    """All rows, those included that ``out`` holds already; new ones are appended to it, line by line.

    Raises:
        MisuseError: an unknown method, workload or line, an odd number of rounds, or no slow network here.
        RankError: a process failed, or a worker held something else than was published.
    """
    _check(options)
    rows = [] if out is None else read_rows(out)
    done = {_key(row) for row in rows}
    wanted: dict[tuple[str, float], list[str]] = {}
    for cell in _cells(options):
        if _key(cell) not in done:
            done.add(_key(cell))
            wanted.setdefault((cell["link"], cell["density"]), []).append(cell["method"])
    for (link, density), methods in wanted.items():
        report(f"{link}, {100 * density:g} % changed: {', '.join(methods)}")
        found = _measure(options, link, density, tuple(methods), report)
        rows += found
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as file:
                file.write("".join(json.dumps(row, sort_keys=True) + "\n" for row in found))
    return rows


def _place(options: SyncOptions) -> str | None:
    """Where the store's folder goes: into memory if there is room, so that no disk is measured."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > _ROOM * options.size:
        return str(memory)
    return None


def _measure(options: SyncOptions, link: str, density: float, methods: tuple[str, ...], report: Report) -> list[Row]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="thinwire-sync-"))
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="thinwire-store-", dir=_place(options)))
        task = SyncTask(
            folder, place, options.workload, options.size, density, methods, options.rounds, options.workers,
            options.seed, options.delay_s, options.loss,
        )  # fmt: skip
        path = Path(folder) / "task.json"
        path.write_text(json.dumps(asdict(task)))
        ranks, network = options.workers + 2, None
        if link != LOOPBACK:
            network = stack.enter_context(SlowNetwork(ranks, link, unlimited=(0,)))
        results = launch(
            "thinwire.bench.sync_worker", [str(path)],
            ranks=ranks, network=network, timeout_s=options.timeout_s, report=report,
        )  # fmt: skip
    return [_row(options, link, density, method, results) for method in methods]


def _row(options: SyncOptions, link: str, density: float, method: str, results: Sequence[list[Row]]) -> Row:
    """One measurement, from what its processes have told: the median round, whose stages add up to it."""
    sent = [row for row in results[1] if row["method"] == method]
    got = [[row for row in rows if row["method"] == method] for rows in results[2:]]
    seconds = [max(rows[k]["proved"] for rows in got) - sent[k]["began"] for k in range(len(sent))]
    order = sorted(range(len(seconds)), key=seconds.__getitem__)
    middle = order[(len(order) - 1) // 2]
    slowest = max((rows[middle] for rows in got), key=lambda row: row["proved"])
    return {
        "bench": "sync",
        "method": method,
        "ours": is_ours(method),
        "density": density,
        "link": link,
        **{key: value for key, value in asdict(options).items() if key in _FACTS},
        "seconds": round(seconds[middle], 4),
        "rounds_s": [round(value, 4) for value in seconds],
        "published_s": round(sent[middle]["published"] - sent[middle]["began"], 4),
        "stages_s": {
            "encode": round(sent[middle]["encode"], 4),
            "upload": round(sent[middle]["upload"], 4),
            **{name: round(slowest[name], 4) for name in ("fetch", "apply", "verify")},
        },
        "pause_s": round(median(max(rows[k]["pause"] for rows in got) for k in range(len(sent))), 4),
        "bytes": sent[middle]["bytes"],
        "line_sent_bytes": None if link == LOOPBACK else sent[middle]["line_bytes"],
        "line_received_bytes": None if link == LOOPBACK else slowest["line_bytes"],
        "verified": True,
        "projected": False,
        "load": load(),
        "machine": machine(),
        "package_versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


_FACTS = ("size", "workload", "workers", "delay_s", "loss", "seed", "rounds")


def project(rows: Sequence[Row], size: int, density: float) -> list[Row]:
    """What the largest measured rows of this density would take for a state of ``size`` bytes: **not** measured.

    Work on memory grows with the state; so do bytes, and over a line with a limit they pass at that limit, where there
    is none at the measured rate. What is left, waiting and requests, stays.
    """
    measured = [row for row in rows if not row["projected"] and (row["density"] == density or row["method"] == "full")]
    if not measured:
        return []
    largest = max(row["size"] for row in measured)
    return [_projected(row, size, density) for row in measured if row["size"] == largest]


def _projected(row: Row, size: int, density: float) -> Row:
    times, stages = size / row["size"], row["stages_s"]
    rate = None if row["link"] in (LOOPBACK, "none") else parse_rate(row["link"])
    after = {name: stages[name] * times for name in _STAGES}
    if rate is not None:
        passing = 8 * row["bytes"] / rate
        for name in ("upload", "fetch"):
            after[name] = 8 * times * row["bytes"] / rate + max(stages[name] - passing, 0.0)
    rest = max(row["seconds"] - sum(stages.values()), 0.0)
    kept = {key: row[key] for key in ("bench", "method", "ours", "link", *_FACTS) if key in row}
    return {
        **kept, "density": density, "size": size, "projected": True, "projected_from": row["size"],
        "seconds": round(sum(after.values()) + rest, 2), "stages_s": {k: round(v, 3) for k, v in after.items()},
        "pause_s": round(row["pause_s"] * times, 3), "bytes": round(row["bytes"] * times), "verified": False,
        "date": row["date"],
    }  # fmt: skip


def winner(rows: Sequence[Row]) -> Row:
    """The row with the least seconds."""
    return min(rows, key=lambda row: row["seconds"])

"""Hundreds of versions, followed by processes that are killed and start again at random: every digest must be right.

The publisher runs here; each consumer is a process that is ended by SIGKILL, so nothing of it is tidied up. What a
consumer held is lost with it: it comes back with random weights and must find its way from an anchor. Every consumer
hashes its own memory after each version; every digest it reports is compared with that of the trainer's weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinwire.bench.follow_plan import Event, plan_events
from thinwire.bench.follow_worker import memory_digest
from thinwire.bench.measure import load, machine, versions
from thinwire.bench.workloads import adam_versions
from thinwire.sync.publisher import Publisher

__all__ = ["FollowOptions", "run_follow"]

Report = Callable[[str], None]
_LR = 2e-6
_READY_S, _CATCH_UP_S = 120.0, 120.0


@dataclass(frozen=True, slots=True)
class FollowOptions:
    """How long, how many, how often killed; the model is small, so that a machine manages all of them at once."""

    versions: int = 300
    consumers: int = 3
    kills: int = 20
    model_bytes: int = 4 << 20
    pace_s: float = 0.05
    seed: int = 0


@dataclass(slots=True)
class _Consumer:
    """One consumer over its lives. It follows version by version if ``every``, else it takes the newest."""

    index: int
    folder: Path
    store: Path
    options: FollowOptions
    process: subprocess.Popen[bytes] | None = None
    lives: int = 0
    crashes: list[str] = field(default_factory=list)
    reported_before: int = 0

    @property
    def path(self) -> Path:
        return self.folder / f"consumer-{self.index}.txt"

    @property
    def every(self) -> bool:
        return self.index % 2 == 1

    def start(self) -> None:
        self.lives += 1
        self.reported_before = len(self.reports())
        seed = self.options.seed + 1000 * self.lives + self.index
        how = [str(self.store), str(self.path), str(self.options.model_bytes), str(seed)]
        command = [sys.executable, "-m", "thinwire.bench.follow_worker", *how, "every" if self.every else "newest"]
        with (self.folder / f"consumer-{self.index}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def stop(self) -> None:
        """SIGKILL. A process that has ended by itself has failed."""
        if self.process is None:
            return
        if self.process.poll() is not None:
            log = (self.folder / f"consumer-{self.index}.log").read_text(errors="replace")
            self.crashes.append(log.strip().splitlines()[-1] if log.strip() else f"exit code {self.process.returncode}")
        self.process.kill()
        self.process.wait()
        self.process = None

    def reports(self) -> list[tuple[int, str]]:
        """(version, digest) of each report so far; a line that was not finished is none."""
        text = self.path.read_text() if self.path.exists() else ""
        lines = text.split("\n")[:-1]
        return [(int(version), digest) for version, digest in (line.split() for line in lines)]

    def wait(self, reached: Callable[[list[tuple[int, str]]], bool], timeout_s: float) -> bool:
        """Until the reports satisfy ``reached``; False if the process ends or the time is up before."""
        deadline = time.monotonic() + timeout_s
        while not reached(self.reports()):
            if time.monotonic() > deadline or self.process is None or self.process.poll() is not None:
                return reached(self.reports())
            time.sleep(0.02)
        return True


def _carry_out(events: list[Event], consumers: list[_Consumer], report: Report) -> int:
    """Kills, then joins; returns how many processes were killed."""
    killed = 0
    for event in sorted(events, key=lambda e: (e.kind != "kill", e.delay_s)):
        consumer = consumers[event.consumer]
        if event.kind == "kill":
            time.sleep(event.delay_s)
            consumer.stop()
            killed += 1
        else:
            consumer.start()
        report(f"version {event.version}: consumer {event.consumer} {'is killed' if event.kind == 'kill' else 'joins'}")
    return killed


def _ready_to_be_killed(events: list[Event], consumers: list[_Consumer]) -> None:
    """A kill is to hit a consumer that follows, not one whose interpreter is still starting."""
    for event in events:
        if event.kind == "kill":
            consumer = consumers[event.consumer]
            consumer.wait(lambda reports, c=consumer: len(reports) > c.reported_before, _READY_S)  # type: ignore[misc]


def _compare(consumers: list[_Consumer], digests: dict[int, str]) -> tuple[int, list[str]]:
    """Number of reports, and those that are wrong."""
    count, wrong = 0, []
    for consumer in consumers:
        for version, digest in consumer.reports():
            count += 1
            if digests.get(version) != digest:
                wrong.append(f"consumer {consumer.index}, version {version}: {digest}, not {digests.get(version)}")
    return count, wrong


def run_follow(folder: Path, options: FollowOptions, *, report: Report = lambda _: None) -> dict[str, Any]:
    """Publish into a store under ``folder`` while consumers follow and are killed; a row with what happened.

    ``mismatches`` lists the reports that differ from the trainer's weights, ``stalled`` the consumers that did not
    reach the last version, ``crashes`` what ended by itself. All three must be empty.
    """
    began = time.perf_counter()
    plan = plan_events(options.versions, options.consumers, options.kills, options.seed)
    store = folder / "store"
    consumers = [_Consumer(k, folder, store, options) for k in range(options.consumers)]
    digests: dict[int, str] = {}
    sent = full = kills = 0
    states = adam_versions(options.model_bytes, _LR, options.seed)
    stalled: list[int] = []
    try:
        with Publisher(str(store), level="smallest", threads=1) as publisher:
            for version in range(1, options.versions + 1):
                state, events = next(states), list(plan.get(version, ()))
                _ready_to_be_killed(events, consumers)
                published = publisher.publish(state, step=version)
                digests[published.version] = memory_digest(state)
                sent, full = sent + published.total_bytes, full + published.full_bytes
                kills += _carry_out(events, consumers, report)
                time.sleep(options.pace_s)
        last = options.versions
        for consumer in consumers:
            if not consumer.wait(lambda reports: any(version == last for version, _ in reports), _CATCH_UP_S):
                stalled.append(consumer.index)
    finally:
        for consumer in consumers:
            consumer.stop()
    reports, wrong = _compare(consumers, digests)
    return {
        "bench": "follow",
        "versions": options.versions,
        "consumers": options.consumers,
        "kills": kills,
        "joins": sum(consumer.lives for consumer in consumers),
        "reports": reports,
        "versions_seen": [len({version for version, _ in consumer.reports()}) for consumer in consumers],
        "mismatches": wrong,
        "stalled": stalled,
        "crashes": [line for consumer in consumers for line in consumer.crashes],
        "published_bytes": sent,
        "full_bytes": full,
        "share_of_full_checkpoints": round(sent / full, 6),
        "state_bytes": full // options.versions,
        "workload": f"simulated Adam, lr {_LR:g}",
        "seed": options.seed,
        "seconds": round(time.perf_counter() - began, 2),
        "load": load(),
        "machine": machine(),
        "package_versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }

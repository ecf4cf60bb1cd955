"""What is known about a run at a moment: all journals' records, added up.

Everything shown or judged is made from a :class:`Picture`, so the live view, the summary and the page cannot differ.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from thinwire.lab.demo.journal import Event
from thinwire.lab.demo.options import RunPlan

__all__ = ["Picture", "Span", "WorkerPicture"]


@dataclass(slots=True)
class Span:
    """A worker held ``version`` from ``start`` to ``end``, in seconds since the run began; ``end`` None: still."""

    version: int
    life: int
    start: float
    end: float | None = None


@dataclass(slots=True)
class WorkerPicture:
    """One worker over all of its lives. ``state`` is absent, starting, waiting, running, killed or done."""

    name: str
    state: str = "absent"
    life: int = 0
    version: int | None = None
    bytes_fetched: int = 0
    answers: int = 0
    applied: list[Event] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    ran: set[tuple[int, str]] = field(default_factory=set)

    def close_span(self, now: float) -> None:
        """The worker no longer holds the version of its last span."""
        if self.spans and self.spans[-1].end is None:
            self.spans[-1].end = now


@dataclass(slots=True)
class Picture:
    """A run so far. Times in ``marks`` and spans are seconds since ``begin`` (seconds since the epoch)."""

    plan: RunPlan
    begin: float
    phase: str = "starting"
    now: float = 0.0
    weights: int = 0
    warm: list[tuple[int, float]] = field(default_factory=list)
    evaluations: dict[str, Event] = field(default_factory=dict)
    published: list[Event] = field(default_factory=list)
    dropped: int = 0
    workers: dict[str, WorkerPicture] = field(default_factory=dict)
    marks: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def digests(self) -> dict[int, str]:
        """The trainer's digest of each version."""
        return {event["version"]: event["digest"] for event in self.published}

    @property
    def steps(self) -> list[Event]:
        """The published versions that an optimiser step made, all but the first."""
        return [event for event in self.published if "reward" in event]

    @property
    def progress(self) -> float:
        """Share of the RL phase that is over, by steps or by time, whichever is further; 1 when it has ended."""
        if self.phase in ("evaluating", "done"):
            return 1.0
        if not self.published:
            return 0.0
        elapsed = self.begin + self.now - float(self.published[0]["t"])
        return min(0.999, max(len(self.steps) / self.plan.steps, elapsed / self.plan.seconds))

    @property
    def sent_bytes(self) -> int:
        """All that the trainer put into the store: patches, anchors and manifests."""
        return sum(event["total_bytes"] for event in self.published)

    @property
    def full_bytes(self) -> int:
        """What a full checkpoint for every version would have been."""
        return sum(event["full_bytes"] for event in self.published)

    def mismatches(self) -> list[tuple[str, int]]:
        """(worker, version) wherever a worker ran weights whose digest is not the trainer's for that version."""
        digests = self.digests
        return sorted(
            (worker.name, version)
            for worker in self.workers.values()
            for version, digest in worker.ran
            if digests.get(version) != digest
        )

    def versions_run(self) -> dict[int, list[str]]:
        """Which workers ran each version."""
        found: dict[int, list[str]] = defaultdict(list)
        for worker in self.workers.values():
            for version in sorted({version for version, _ in worker.ran}):
                found[version].append(worker.name)
        return found

    def take(self, event: Event) -> None:
        """Add one record."""
        self.now = max(self.now, float(event["t"]) - self.begin)
        who = event["who"]
        if who == "trainer":
            self._take_trainer(event)
        elif who == "director":
            self._take_director(event)
        else:
            self._take_worker(self.workers.setdefault(who, WorkerPicture(who)), event)

    def _take_trainer(self, event: Event) -> None:
        what = event["what"]
        if what == "built":
            self.weights = event["weights"]
            self.phase = "preparing"
        elif what == "warm":
            self.phase = "warm start"
            self.warm.append((event["step"], event["r"]))
        elif what == "evaluated":
            self.evaluations[event["moment"]] = event
        elif what == "published":
            self.phase = "learning"
            self.published.append(event)
        elif what == "dropped":
            self.dropped += 1
        elif what == "trained":
            self.phase = "evaluating"
        elif what == "done":
            self.phase = "done"

    def _take_director(self, event: Event) -> None:
        worker = self.workers.get(event.get("target", ""))
        at = float(event["t"]) - self.begin
        if event["what"] == "mark":
            self.marks.append((at, event["target"], event["action"]))
        if worker is None:
            if event["what"] == "mark" and event["action"] in ("start", "join"):
                self.workers[event["target"]] = WorkerPicture(event["target"], state="starting", life=1)
            return
        if event["action"] == "kill":
            worker.state = "killed"
            worker.close_span(at)
        elif event["action"] == "restart":
            worker.state = "starting"
            worker.life += 1

    def _take_worker(self, worker: WorkerPicture, event: Event) -> None:
        what = event["what"]
        at = float(event["t"]) - self.begin
        worker.life = max(worker.life, event["life"])
        if what == "ready":
            worker.state = "waiting"
        elif what == "applied":
            worker.state = "running"
            worker.version = event["version"]
            worker.bytes_fetched += event["bytes_fetched"]
            worker.applied.append(event)
            worker.ran |= {(event["version"], event["digest"]), (event["version"], event["own_digest"])}
            worker.close_span(at)
            worker.spans.append(Span(event["version"], event["life"], at))
        elif what == "sampled":
            worker.answers += event["answers"]
            worker.ran.add((event["version"], event["digest"]))
        elif what == "done":
            worker.state = "done"
            worker.ran.add((event["version"], event["digest"]))
            worker.close_span(at)

"""What a run showed, and whether it is what the demo promises."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thinwire.lab.demo.picture import Picture

__all__ = ["Check", "DemoSummary", "WorkerSummary", "summarise"]

RISE_Z_MIN = 3.0
"""A rise counts when it is this many standard errors: by chance once in 700 runs."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of the demo, whether it was kept, and the figures."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class WorkerSummary:
    """``versions`` is how many different versions it ran, ``lives`` how often it was started."""

    name: str
    lives: int
    versions: int
    last_version: int
    bytes_fetched: int
    answers: int


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """A run in figures. Sizes are in bytes, times in seconds, densities are shares of all weights.

    ``reward_*`` are mean rewards on held-out problems, sampled at temperature 1 and greedy; ``rise_z`` is the mean
    rise per problem over its standard error. ``seconds`` holds, for publishing and for applying, the median time of
    each stage.
    """

    model: str
    weights: int
    seed: int
    lr: float
    steps: int
    reward_before: float
    reward_after: float
    greedy_before: float
    greedy_after: float
    rise_z: float
    versions: int
    versions_verified: int
    digests_compared: int
    digest_mismatches: int
    sent_bytes: int
    patch_bytes: int
    full_checkpoint_bytes: int
    all_full_bytes: int
    density_median: float
    density_first: float
    density_last: float
    staleness_mean: float
    dropped: int
    seconds: dict[str, dict[str, float]]
    run_s: float
    learning_s: float
    workers: tuple[WorkerSummary, ...]
    checks: tuple[Check, ...]
    folder: Path
    page: Path | None = None

    @property
    def passed(self) -> bool:
        """Every promise was kept."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        page = None if self.page is None else str(self.page)
        return {**asdict(self), "folder": str(self.folder), "page": page, "passed": self.passed}


def rise_z(before: Iterable[float], after: Iterable[float]) -> float:
    """Mean difference of paired values over its standard error; 0 if no pair differs.

    >>> round(rise_z([0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]), 2)
    1.73
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    spread = statistics.stdev(differences)
    mean = statistics.fmean(differences)
    if spread == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / (spread / math.sqrt(len(differences)))


def stage_medians(reports: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of each stage over all reports that have it."""
    values: dict[str, list[float]] = {}
    for report in reports:
        for stage, seconds in report.items():
            values.setdefault(stage, []).append(seconds)
    return {stage: statistics.median(found) for stage, found in values.items()}


def summarise(picture: Picture) -> DemoSummary:
    """The summary of a run that has ended."""
    before, after = picture.evaluations["before"], picture.evaluations["after"]
    steps = picture.steps
    deltas = [event for event in picture.published if event["kind"] != "anchor"] or picture.published
    applied = [event for worker in picture.workers.values() for event in worker.applied if event["hops"] == 1]
    staleness = [age for event in steps for age in event["staleness"]]
    z = rise_z(before["per_problem"], after["per_problem"])
    last = picture.published[-1]
    return DemoSummary(
        model=picture.plan.model,
        weights=picture.weights,
        seed=picture.plan.seed,
        lr=picture.plan.lr,
        steps=len(steps),
        reward_before=before["sampled"],
        reward_after=after["sampled"],
        greedy_before=before["greedy"],
        greedy_after=after["greedy"],
        rise_z=z,
        versions=len(picture.published),
        versions_verified=len(picture.versions_run()),
        digests_compared=sum(len(worker.ran) for worker in picture.workers.values()),
        digest_mismatches=len(picture.mismatches()),
        sent_bytes=picture.sent_bytes,
        patch_bytes=int(statistics.median(event["patch_bytes"] for event in deltas)),
        full_checkpoint_bytes=last["full_bytes"],
        all_full_bytes=picture.full_bytes,
        density_median=statistics.median(event["density"] for event in steps),
        density_first=steps[0]["density"],
        density_last=steps[-1]["density"],
        staleness_mean=statistics.fmean(staleness),
        dropped=picture.dropped,
        seconds={
            "publish": stage_medians(event["seconds"] for event in steps),
            "apply": stage_medians(event["seconds"] for event in applied),
            "step": {"total": statistics.median(event["step_s"] for event in steps)},
        },
        run_s=picture.now,
        learning_s=float(last["t"]) - float(picture.published[0]["t"]),
        workers=_workers(picture),
        checks=_checks(picture, z),
        folder=picture.plan.folder,
    )


def _workers(picture: Picture) -> tuple[WorkerSummary, ...]:
    return tuple(
        WorkerSummary(
            name=worker.name,
            lives=worker.life,
            versions=len({version for version, _ in worker.ran}),
            last_version=worker.version or 0,
            bytes_fetched=worker.bytes_fetched,
            answers=worker.answers,
        )
        for _, worker in sorted(picture.workers.items())
    )


def _checks(picture: Picture, z: float) -> tuple[Check, ...]:
    before, after = picture.evaluations["before"]["sampled"], picture.evaluations["after"]["sampled"]
    mismatches = picture.mismatches()
    compared = sum(len(worker.ran) for worker in picture.workers.values())
    last = picture.published[-1]["version"]
    digest = picture.published[-1]["digest"]
    behind = [worker.name for worker in picture.workers.values() if (last, digest) not in worker.ran]
    unseen = sorted(set(picture.digests) - set(picture.versions_run()))
    killed = [target for _, target, action in picture.marks if action == "kill"]
    joined = [target for _, target, action in picture.marks if action == "join"]
    return (
        Check(
            "every worker ran the trainer's weights, bit for bit",
            not mismatches and compared > 0,
            f"{compared} digests compared, {len(mismatches)} differ" + (f": {mismatches[:5]}" if mismatches else ""),
        ),
        Check(
            "every version was checked by a worker",
            not unseen,
            f"{len(picture.digests) - len(unseen)} of {len(picture.digests)}"
            + (f"; not {unseen[:5]}" if unseen else ""),
        ),
        Check(
            "all followed to the last version",
            not behind,
            f"version {last}; killed and back: {', '.join(killed) or 'none'}; late: {', '.join(joined) or 'none'}",
        ),
        Check(
            "the reward rose",
            z >= RISE_Z_MIN and after > before,
            f"{before:.3f} to {after:.3f} on held-out problems, {z:.1f} standard errors",
        ),
        Check(
            "less was sent than full checkpoints",
            picture.sent_bytes < picture.full_bytes,
            f"{picture.sent_bytes:,} of {picture.full_bytes:,} bytes, 1/{picture.full_bytes / picture.sent_bytes:.0f}",
        ),
    )

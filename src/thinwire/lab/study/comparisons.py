"""Findings that compare runs from the same weights, and the curvature that they start from."""

from __future__ import annotations

import math
from typing import Any

from thinwire.lab.study.evidence import AXES, Finding, Line, Table, centred, density_of, per_cent, verdict_of
from thinwire.lab.study.statistics import correlation, mean_of

__all__ = ["curved_starts", "same_weights"]

_PAIRS: tuple[tuple[str, dict[str, Any], str, Any], ...] = (
    ("rl: other problems and answers", {}, "repeat", 1),
    ("rl: another seed, the same weights", {}, "seed", None),
    ("rl: random gradients instead", {}, "control", "random"),
    ("rl: shuffled advantages instead", {}, "control", "shuffled"),
    ("rl: a partial reward instead", {}, "reward", "partial"),
    ("rl: fine-tuning instead", {}, "objective", "sft"),
    ("rl: SGD instead", {"optimiser": "adamw"}, "optimiser", "sgd"),
    ("random gradients: others", {"control": "random"}, "repeat", 1),
    ("sft: other problems", {"objective": "sft"}, "repeat", 1),
    ("sft: another task", {"objective": "sft"}, "task", None),
)
"""Pairs of runs from the same weights: how the line is called, the first run's axes, and where the second differs."""


def _overlaps(table: Table, which: str, axes: dict[str, Any], axis: str, other: Any) -> dict[int, list[float]]:
    """Jaccard's index and that of chance, by seed, of runs that differ in ``axis`` (any other value if None)."""
    first = table.centre | axes
    pairs: dict[int, list[list[float]]] = {}
    free = (axis, "start") if axis == "task" else (axis,)
    for one_axes, runs in table.conditions():
        if any(one_axes[name] != first[name] for name in AXES if name not in free):
            continue
        for seed, run in runs.items():
            for pair in run.get("overlaps", []):
                ends = {run[axis], pair["with"]}
                known = axis == "seed" or first[axis] in ends
                if pair["axis"] == axis and known and (other is None or other in ends):
                    pairs.setdefault(seed, []).append(pair[which])
    return {seed: [sum(side) / len(side) for side in zip(*pairs[seed], strict=True)] for seed in sorted(pairs)}


def same_weights(table: Table) -> Finding:
    """Whether runs from the same weights change the same ones, beside runs of random gradients."""
    lines, found = [], {}
    for label, axes, axis, other in _PAIRS:
        for which, name in (("step", "one step"), ("whole", "the whole run")):
            values = _overlaps(table, which, axes, axis, other)
            if values:
                found[label, which] = values
                lines.append(Line(f"{label}, {name}", mean_of([value for value, _ in values.values()]), "%"))
                if axes == {} and axis in ("repeat", "seed"):
                    lines.append(Line(f"chance, {name}", mean_of([chance for _, chance in values.values()]), "%"))
    for objective, control in (("rl", "none"), ("rl", "random"), ("sft", "none")):
        runs = table.seeds(objective=objective, control=control).values()
        if runs and all(run.get("consecutive") is not None for run in runs):
            title = "random gradients" if control == "random" else objective
            lines.append(Line(f"{title}: successive steps of a run", mean_of([r["consecutive"] for r in runs]), "%"))
    same = found.get((_PAIRS[0][0], "whole")) or found.get((_PAIRS[1][0], "whole"), {})
    noise = found.get((_PAIRS[2][0], "whole"), {})
    both = sorted(set(same) & set(noise))
    if not both:
        return Finding("overlap", "", "undecided", "The study has no such runs.")
    beyond = mean_of([same[seed][0] - noise[seed][0] for seed in both])
    lines.insert(0, Line("rl with rl - rl with random gradients, the whole run", beyond, "%"))
    shares = [mean_of([one[seed][0] for seed in both]) for one in (same, noise)]
    return Finding(
        "overlap", "RL has a subnetwork of its own: two runs change the same weights, more than rounding makes them",
        verdict_of(beyond.low > 0, beyond.high < 0, [beyond]),
        f"Two RL runs from the same weights share {per_cent(shares[0])} of what either changes; a run of random "
        f"gradients shares {per_cent(shares[1])} with them.", tuple(lines),
    )  # fmt: skip


def curved_starts(table: Table) -> Finding:
    """Whether the curvature where a run starts goes with how many weights it changes. Starts are the unit: what runs
    from one start changed, each relative to its condition's mean, is averaged."""
    lines: list[Line] = []
    density: dict[tuple[Any, ...], list[float]] = {}
    sharpness: dict[tuple[Any, ...], float] = {}
    for axes, runs in table.conditions():
        curved = {seed: run for seed, run in runs.items() if run.get("curvature")}
        plain = (axes["control"], axes["enforce"], axes["weights"]) == ("none", "none", "masters")
        if len(curved) < 2 or not plain or axes["objective"] == "pretrain":
            continue
        mean = sum(density_of(run) for run in curved.values()) / len(curved)
        for seed, run in curved.items():
            start = (axes["size"], axes["start"] or axes["task"], seed)
            density.setdefault(start, []).append(density_of(run) / max(mean, 1e-12))
            sharpness[start] = run["curvature"][0]["fisher_largest"]
    for objective in ("rl", "sft", "pretrain"):
        measured = [run["curvature"] for run in table.seeds(objective=objective).values() if run.get("curvature")]
        for key, title in _CURVATURES.items():
            for at, when in ((0, "before"), (1, "after")):
                values = [run[at][key] for run in measured]
                if any(values) and not (at == 0 and objective == "sft"):  # the same weights as RL's
                    lines.append(Line(f"{objective}: {title} {when}", mean_of(values)))
    groups = list(dict.fromkeys(start[:2] for start in sharpness))
    pairs = []
    for group in groups:
        starts = [start for start in sharpness if start[:2] == group]
        sharp = centred([math.log(max(sharpness[start], 1e-12)) for start in starts])
        pairs += [
            (sum(density[start]) / len(density[start]), value) for start, value in zip(starts, sharp, strict=True)
        ]
    if len(pairs) < 12:
        return Finding("curvature", "", "undecided", "The curvature of too few starts was measured.")
    within = correlation([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    lines.insert(0, Line("Spearman, density and the policy's largest eigenvalue at the start", within))
    return Finding(
        "curvature", "the sharper the start, the more weights a step changes",
        verdict_of(within.low > 0, within.high < 0, [within]),
        f"Over {within.count} starts of {len(groups)} kinds (size, task), the density of runs from a start, relative "
        "to that of others of its kind, and the largest eigenvalue of its policy's Fisher matrix correlate by "
        f"{within.value:+.2f} ({within.low:+.2f} to {within.high:+.2f}).",
        tuple(lines),
    )  # fmt: skip


_CURVATURES = {
    "hessian_largest": "largest eigenvalue of the objective's Hessian",
    "hessian_trace": "trace of the objective's Hessian",
    "fisher_largest": "largest eigenvalue of the policy's Fisher matrix",
    "fisher_trace": "trace of the policy's Fisher matrix",
}

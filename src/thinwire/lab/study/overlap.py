"""Do two runs from the same weights change the same ones? Overlaps of a study's masks, beside what chance makes.

A run keeps two masks of the weights that are served: what its last ``step`` changed, and the ``whole`` run. Two runs
are compared if they start from the same weights and differ in one axis alone. Chance is the mean overlap of two random
sets as large; but weights are not alike (small ones change more easily), so what tells is the overlap with a run of
random gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinwire.probe.changes import Words, compare
from thinwire.probe.frequency import expected_jaccard, jaccard, load_masks, save_masks

__all__ = ["MASKS", "Masks", "add_overlaps", "masks_file", "overlap_of"]

MASKS = ("step", "whole")
_AXES = ("objective", "optimiser", "task", "reward", "control", "repeat", "seed")
_SAME = ("size", "weights", "lr", "enforce", "density", "steps")

Overlap = dict[str, Any]


class Masks:
    """What a run's last step and the whole run changed of ``weights``, and how much successive steps have in common."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        self._first = {name: w.clone() for name, w in weights.items()}
        self._before = {name: w.clone() for name, w in weights.items()}
        self._sizes = [w.numel() for w in weights.values()]
        self._last = self._empty()
        self._steps = 0
        self._overlaps = 0.0

    def _empty(self) -> Words:
        return np.zeros(sum(-(-size // 64) for size in self._sizes), np.uint64)

    def _changed(self, old: Mapping[str, torch.Tensor], *, renew: bool) -> Words:
        words, first = self._empty(), 0
        for (name, now), size in zip(self._weights.items(), self._sizes, strict=True):
            end = first + -(-size // 64)
            compare(old[name], now, renew=renew, words=words[first:end])
            first = end
        return words

    def step(self) -> None:
        """Take note of what changed since the last call."""
        now = self._changed(self._before, renew=True)
        if self._steps:
            self._overlaps += jaccard(now, self._last)
        self._last = now
        self._steps += 1

    @property
    def consecutive(self) -> float | None:
        """The mean overlap of the changes of successive steps; None of fewer than two."""
        return self._overlaps / (self._steps - 1) if self._steps > 1 else None

    def save(self, path: Path) -> None:
        """Write both masks, whole or not at all."""
        words = self._changed(self._first, renew=False)
        elements = 64 * words.size  # tensors begin at words; what is between them never changes
        save_masks(path, {"step": (self._last, elements), "whole": (words, elements)})


def masks_file(out: Path, name: str) -> Path:
    """Where the masks of the run ``name`` are kept."""
    return out / "masks" / f"{name}.npz"


def overlap_of(one: Words, other: Words, elements: int) -> tuple[float, float]:
    """Jaccard's index of two masks over ``elements``, and its mean for random sets as large."""
    sizes = (int(np.bitwise_count(words).sum()) for words in (one, other))
    return jaccard(one, other), expected_jaccard(elements, *sizes)


def _origin(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two runs must have in common: above all the weights, which of a pretrained model are those of any seed."""
    weights = (run["seed"], run.get("start") or run["task"]) if run["made_here"] else ()
    return (*(run[axis] for axis in _SAME), *weights)


def add_overlaps(summaries: Sequence[dict[str, Any]], out: Path, centre: Mapping[str, Any]) -> None:
    """Give each summary ``overlaps``: for every run after it that starts from the same weights at the centre's learning
    rate and differs in one axis, that axis, the other's value, and of both masks the overlap and that of chance."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for summary in summaries:
        summary["overlaps"] = []
        plain = summary["lr"] == centre["lr"] and summary["enforce"] == "none" and summary["size"] == centre["size"]
        if plain and summary["objective"] != "pretrain" and masks_file(out, summary["id"]).exists():
            groups.setdefault(_origin(summary), []).append(summary)
    for group in groups.values():
        masks = {summary["id"]: load_masks(masks_file(out, summary["id"])) for summary in group}
        for one, other in itertools.combinations(group, 2):
            differing = [axis for axis in _AXES if one[axis] != other[axis]]
            if len(differing) == 1:
                one["overlaps"].append(_pair(one, other, differing[0], masks))


def _pair(one: Mapping[str, Any], other: Mapping[str, Any], axis: str, masks: Mapping[str, Any]) -> Overlap:
    found: Overlap = {"axis": axis, "with": other[axis]}
    for name in MASKS:
        a, b = masks[one["id"]][name][0], masks[other["id"]][name][0]
        found[name] = [round(value, 6) for value in overlap_of(a, b, one["parameters"])]
    return found

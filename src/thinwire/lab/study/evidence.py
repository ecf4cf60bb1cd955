"""What findings are made of: the runs of a study by their axes, estimates with intervals, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from thinwire.lab.study.matrix import Run
from thinwire.lab.study.statistics import Estimate, mean_of
from thinwire.lab.study.summary import Summary

__all__ = ["AXES", "Finding", "Line", "Table", "centred", "density_of", "excess_of", "flat", "per_cent", "select",
           "verdict_of"]  # fmt: skip

AXES = tuple(f.name for f in fields(Run) if f.name != "seed")
_SEEDS_MIN = 5
_DEFAULTS = asdict(Run())


@dataclass(frozen=True, slots=True)
class Line:
    """One estimate of a finding, and what it is of; ``unit`` is ``%`` for shares, which are shown in per cent."""

    label: str
    estimate: Estimate
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A hypothesis, its verdict (``supported``, ``refuted`` or ``undecided``), why, and the estimates behind it."""

    name: str
    hypothesis: str
    verdict: str
    why: str
    lines: tuple[Line, ...] = field(default=())


def per_cent(estimate: Estimate) -> str:
    """A share and its interval, in per cent.

    >>> per_cent(Estimate(0.0123, 0.0101, 0.0146, 5))
    '1.23 % (1.01 to 1.46)'
    """
    return f"{100 * estimate.value:.3g} % ({100 * estimate.low:.3g} to {100 * estimate.high:.3g})"


class Table:
    """The summaries, found by their axes; what is not named is as in the centre."""

    def __init__(self, summaries: Sequence[Summary], centre: Mapping[str, Any]) -> None:
        self.all = list(summaries)
        self.centre = {axis: centre.get(axis, _DEFAULTS[axis]) for axis in AXES}
        self._by: dict[tuple[Any, ...], dict[int, Summary]] = {}
        for summary in self.all:
            self._by.setdefault(self._key(summary), {})[summary["seed"]] = summary

    @staticmethod
    def _key(axes: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(axes.get(axis, _DEFAULTS[axis]) for axis in AXES)

    def seeds(self, **axes: Any) -> dict[int, Summary]:
        """The runs of a condition by seed; empty if the study has none of it."""
        return self._by.get(self._key(self.centre | axes), {})

    def conditions(self) -> Iterator[tuple[dict[str, Any], dict[int, Summary]]]:
        for key, runs in self._by.items():
            yield dict(zip(AXES, key, strict=True)), runs

    def mean(self, value: Callable[[Summary], float], **axes: Any) -> Estimate | None:
        runs = self.seeds(**axes)
        return mean_of([value(run) for run in runs.values()]) if runs else None

    def paired(
        self, value: Callable[[Summary], float], one: Mapping[str, Any], other: Mapping[str, Any]
    ) -> Estimate | None:
        """The mean difference ``value(one) - value(other)`` over the seeds that both have."""
        a, b = self.seeds(**one), self.seeds(**other)
        both = sorted(set(a) & set(b))
        return mean_of([value(a[seed]) - value(b[seed]) for seed in both]) if both else None


def select(summaries: Sequence[Summary], centre: Mapping[str, Any], **axes: Any) -> dict[int, Summary]:
    """The runs of a condition by seed; axes that are not named are as in the centre."""
    return Table(summaries, centre).seeds(**axes)


def density_of(summary: Summary) -> float:
    """The share of the weights that changed in a step."""
    return float(summary["shares"]["1"][0])


def excess_of(summary: Summary) -> float:
    """What of it is beyond the null."""
    observed, null = summary["shares"]["1"]
    return float(observed - null)


def verdict_of(yes: bool, no: bool, estimates: Sequence[Estimate]) -> str:
    """Nothing is claimed of fewer than five seeds."""
    if not estimates or min(estimate.count for estimate in estimates) < _SEEDS_MIN:
        return "undecided"
    return "supported" if yes else "refuted" if no else "undecided"


def flat(parts: Iterable[Iterable[float]]) -> list[float]:
    """The values of all parts."""
    return [value for part in parts for value in part]


def centred(values: Sequence[float]) -> list[float]:
    """The values less their mean."""
    mean = sum(values) / len(values)
    return [value - mean for value in values]

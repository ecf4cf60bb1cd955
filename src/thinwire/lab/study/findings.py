"""What a study says to each hypothesis: supported, refuted or undecided, with the interval that decides.

Every answer comes of :func:`thinwire.lab.study.summary.summary_of` alone. Seeds are the unit: intervals are Student's
95 % over seeds, differences are taken within a seed. What is beyond the *null*, the share of weights that random
gradients would change at the same data type, learning rate, optimiser and weights, is called *excess*.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from thinwire.lab.study.matrix import LEVELS, Run
from thinwire.lab.study.statistics import Estimate, correlation, friedman, mean_of
from thinwire.lab.study.summary import QUARTERS, Summary

__all__ = ["Finding", "Line", "answers", "per_cent", "select"]

AXES = tuple(f.name for f in fields(Run) if f.name != "seed")
_SEEDS_MIN = 5


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


class _Table:
    """The summaries, found by their axes; what is not named is as in the centre."""

    def __init__(self, summaries: Sequence[Summary], centre: Mapping[str, Any]) -> None:
        self.all = list(summaries)
        self.centre = {axis: centre[axis] for axis in AXES}
        self._by: dict[tuple[Any, ...], dict[int, Summary]] = {}
        for summary in self.all:
            self._by.setdefault(self._key(summary), {})[summary["seed"]] = summary

    @staticmethod
    def _key(axes: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(axes[axis] for axis in AXES)

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
    return _Table(summaries, centre).seeds(**axes)


def _density(summary: Summary) -> float:
    return float(summary["shares"]["1"][0])


def _excess(summary: Summary) -> float:
    observed, null = summary["shares"]["1"]
    return float(observed - null)


def _kind(name: str, *, beyond_null: bool) -> Callable[[Summary], float]:
    def value(summary: Summary) -> float:
        observed, null = summary["kinds"][name]
        return float(observed - null if beyond_null else observed)

    return value


def _verdict(yes: bool, no: bool, estimates: Sequence[Estimate]) -> str:
    """Nothing is claimed of fewer than five seeds."""
    if not estimates or min(estimate.count for estimate in estimates) < _SEEDS_MIN:
        return "undecided"
    return "supported" if yes else "refuted" if no else "undecided"


def _sparse_everywhere(table: _Table) -> Finding:
    lines, low, high, narrow = [], 1.0, 0.0, 0
    for axes, runs in table.conditions():
        if axes["weights"] == "fp32" or axes["enforce"] != "none" or axes["control"] != "none":
            continue
        estimate = mean_of([1 - _density(run) for run in runs.values()])
        low, high = min(low, estimate.value), max(high, estimate.value)
        narrow += estimate.low >= 0.98
        label = f"{axes['objective']}, {axes['optimiser']}, lr {axes['lr']}, {axes['size']}, {axes['weights']}"
        lines.append(Line(label, estimate, "%"))
    fp32 = table.mean(lambda s: 1 - _density(s), weights="fp32")
    estimates = [line.estimate for line in lines]
    why = (
        f"{narrow} of {len(lines)} conditions are at least 98 % sparse in a step; the range is {100 * low:.1f} to "
        f"{100 * high:.2f} %."
    )
    if fp32 is not None:
        lines.append(Line("rl, the same with fp32 weights", fp32, "%"))
        why += f" With fp32 weights the same run is {100 * fp32.value:.2g} % sparse."
    shown = sorted(lines, key=lambda line: line.estimate.value)
    return Finding(
        "sparse-everywhere", "98 to 99 % of the weights do not change in a step, whatever is trained and how",
        _verdict(all(e.low >= 0.98 for e in estimates), any(e.high < 0.98 for e in estimates), estimates), why,
        tuple(shown[:3] + shown[-3:]),
    )  # fmt: skip


def _learning_or_rounding(table: _Table) -> Finding:
    lines = []
    for objective in ("rl", "sft", "pretrain"):
        excess = table.mean(_excess, objective=objective)
        against = table.paired(_density, {"objective": objective}, {"objective": objective, "control": "random"})
        if excess is not None:
            lines.append(Line(f"{objective}: observed - null", excess, "%"))
        if against is not None:
            lines.append(Line(f"{objective}: real - random gradients", against, "%"))
    shuffled = table.paired(_density, {}, {"control": "shuffled"})
    if shuffled is not None:
        lines.append(Line("rl: real - shuffled advantages", shuffled, "%"))
    rl = table.mean(_density)
    excess = table.mean(_excess)
    if rl is None or excess is None:
        return Finding("rounding", "", "undecided", "The study has no such runs.")
    if not rl.value:
        return Finding("rounding", "", "undecided", "RL changed no weight.")
    size = max(abs(excess.low), abs(excess.high)) / rl.value
    return Finding(
        "rounding", "in RL, how many weights change follows from rounding alone, to a tenth of it",
        _verdict(size < 0.1, min(abs(excess.low), abs(excess.high)) / rl.value > 0.1 and excess.sign != 0, [excess]),
        f"RL changes {per_cent(rl)} of the weights in a step; beyond the null are {per_cent(excess)}.", tuple(lines),
    )  # fmt: skip


def _kinds_in_order(table: _Table) -> Finding:
    order, lines, steps = ("attention", "mlp", "norm"), [], []
    for objective in ("rl", "sft", "pretrain"):
        runs = table.seeds(objective=objective)
        if not runs or not all(kind in run["kinds"] for kind in order for run in runs.values()):
            continue
        for kind in order:
            values = [1 - _kind(kind, beyond_null=False)(run) for run in runs.values()]
            lines.append(Line(f"{objective}: sparsity of {kind}", mean_of(values), "%"))
        for less, more in itertools.pairwise(order):
            difference = [run["kinds"][less][0] - run["kinds"][more][0] for run in runs.values()]
            steps.append(mean_of(difference))
            beyond = [_kind(less, beyond_null=True)(r) - _kind(more, beyond_null=True)(r) for r in runs.values()]
            lines.append(Line(f"{objective}: {more} sparser than {less} by", steps[-1], "%"))
            lines.append(Line(f"{objective}: the same beyond the null", mean_of(beyond), "%"))
    return Finding(
        "kinds", "attention is less sparse than MLP, and MLP less than norms",
        _verdict(all(e.sign > 0 for e in steps), any(e.sign < 0 for e in steps), steps),
        f"{sum(e.sign > 0 for e in steps)} of {len(steps)} neighbours in this order differ as claimed, "
        f"{sum(e.sign < 0 for e in steps)} the other way round.", tuple(lines),
    )  # fmt: skip


def _sparser_with_time(table: _Table) -> Finding:
    lines, raw = [], []
    for objective in ("rl", "sft", "pretrain"):
        runs = table.seeds(objective=objective)
        if not runs or any(None in run["quarters"] for run in runs.values()):  # runs of less than four steps
            continue
        change = mean_of([run["quarters"][-1][0] - run["quarters"][0][0] for run in runs.values()])
        null = mean_of([run["quarters"][-1][1] - run["quarters"][0][1] for run in runs.values()])
        raw.append(change)
        lines += [Line(f"{objective}: change of density, last - first quarter", change, "%"),
                  Line(f"{objective}: the same of the null", null, "%")]  # fmt: skip
    return Finding(
        "time", "updates become sparser as training goes on",
        _verdict(all(e.sign < 0 for e in raw), any(e.sign > 0 for e in raw), raw),
        "Adam's first steps are its largest (its moments are corrected for their start), with random gradients too.",
        tuple(lines),
    )  # fmt: skip


def _rl_against_sft(table: _Table) -> Finding:
    lines, raw, beyond = [], [], []
    for optimiser in ("adam", "adamw", "sgd", "adafactor"):
        for level in LEVELS:
            axes = {"optimiser": optimiser, "lr": level}
            one, other = axes | {"objective": "rl"}, axes | {"objective": "sft"}
            difference = table.paired(_density, one, other)
            excess = table.paired(_excess, one, other)
            if difference is not None and excess is not None:
                raw.append(difference)
                beyond.append(excess)
                lines.append(Line(f"{optimiser}, lr {level}: density of RL - of SFT", difference, "%"))
    fewer, more = sum(e.sign < 0 for e in raw), sum(e.sign > 0 for e in raw)
    return Finding(
        "rl-sft", "RL is sparser than supervised fine-tuning from the same start, at the same learning rate",
        _verdict(fewer == len(raw), more == len(raw), raw),
        f"RL is sparser in {fewer} of {len(raw)} pairs of optimiser and learning rate, denser in {more}; beyond the "
        f"null, sparser in {sum(e.sign < 0 for e in beyond)}, denser in {sum(e.sign > 0 for e in beyond)}.",
        tuple(lines),
    )  # fmt: skip


def _predicts_convergence(table: _Table) -> Finding:
    groups: dict[tuple[Any, ...], list[Summary]] = {}
    for axes, runs in table.conditions():
        plain = axes["control"] == "none" and axes["enforce"] == "none" and axes["weights"] != "fp32"
        if plain and axes["objective"] == "rl" and axes["steps"] >= QUARTERS:
            groups[tuple(axes.values())] = list(runs.values())
    early = [[run["quarters"][0][0] for run in runs] for runs in groups.values()]
    gains = [[run["gain"] for run in runs] for runs in groups.values()]
    if sum(map(len, early)) < 12:
        return Finding("convergence", "", "undecided", "The study has too few RL runs.")
    across = correlation(_flat(early), _flat(gains))
    within = correlation(_flat(map(_centred, early)), _flat(map(_centred, gains)))
    return Finding(
        "convergence", "how sparse a run is early on predicts how far its reward rises",
        _verdict(within.sign != 0, False, [within]),
        f"Across all RL runs, the density of the first quarter and the gain correlate by {across.value:+.2f} "
        f"({across.low:+.2f} to {across.high:+.2f}), as the learning rate moves both; within a condition, by "
        f"{within.value:+.2f} ({within.low:+.2f} to {within.high:+.2f}).",
        (Line("Spearman, across conditions", across), Line("Spearman, within conditions", within)),
    )  # fmt: skip


def _flat(parts: Any) -> list[float]:
    return [value for part in parts for value in part]


def _centred(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [value - mean for value in values]


def _slope(points: Sequence[tuple[float, float]]) -> float:
    x, y = np.log([max(p[0], 1e-30) for p in points]), np.log([max(p[1], 1e-9) for p in points])
    return float(np.polyfit(x, y, 1)[0])


def _learning_rate(table: _Table) -> Finding:
    lines, slopes = [], []
    for objective in ("rl", "sft", "pretrain"):
        for optimiser in ("adam", "adamw", "sgd", "adafactor"):
            levels = [table.seeds(objective=objective, optimiser=optimiser, lr=level) for level in LEVELS]
            seeds = sorted(set.intersection(*(set(level) for level in levels)))
            if not seeds:
                continue
            found, expected = (
                mean_of([_slope([(lv[s]["lr_value"], lv[s]["shares"]["1"][side]) for lv in levels]) for s in seeds])
                for side in (0, 1)
            )
            slopes.append(found)
            lines += [
                Line(f"{objective}, {optimiser}: exponent", found),
                Line(f"{objective}, {optimiser}: null", expected),
            ]
    return Finding(
        "learning-rate", "the higher the learning rate, the less sparse",
        _verdict(all(e.sign > 0 for e in slopes), any(e.sign < 0 for e in slopes), slopes),
        "The exponent is that of density ~ lr^exponent over a factor of 100; 1 is proportional, and less than 1 where "
        "most weights change already.", tuple(lines),
    )  # fmt: skip


def _enforced(table: _Table) -> Finding:
    lines, effects = [], []
    dense = {"lr": "high"}
    reference = table.mean(lambda s: s["gain"], **dense)
    if reference is not None:
        lines.append(Line("gain of reward, dense", reference))
    for density in sorted({a["density"] for a, _ in table.conditions() if a["enforce"] != "none"}):
        for how in ("random", "gradient"):
            effect = table.paired(lambda s: s["gain"], dense | {"enforce": how, "density": density}, dense)
            if effect is not None:
                effects.append(effect)
                lines.append(Line(f"{density:.0%} of the weights, by {how}: gain - dense gain", effect))
    hurts, helps = sum(e.sign < 0 for e in effects), sum(e.sign > 0 for e in effects)
    return Finding(
        "enforced", "training only a few weights costs reward",
        _verdict(hurts == len(effects), helps > 0 or not hurts, effects),
        f"Of {len(effects)} ways to choose few weights, {hurts} gain less reward than dense training at the same "
        f"learning rate, {helps} more.", tuple(lines),
    )  # fmt: skip


def _layers_differ(table: _Table) -> Finding:
    runs = list(table.seeds().values())
    names = [name for name in (runs[0]["layers"] if runs else {}) if name != "outside"]
    if len(runs) < 2 or len(names) < 2:
        return Finding("layers", "", "undecided", "The study has no such runs.")
    raw = np.array([[run["layers"][name][0] for name in names] for run in runs])
    beyond = np.array([[run["layers"][name][0] - run["layers"][name][1] for name in names] for run in runs])
    p_raw, p_beyond = friedman(raw), friedman(beyond)
    lines = tuple(Line(f"layer {name}: density beyond the null", mean_of(list(beyond[:, i])), "%")
                  for i, name in enumerate(names))  # fmt: skip
    estimate = mean_of([float(value) for value in beyond[:, 0]])
    return Finding(
        "layers", "in RL, some layers change more than others, beyond what rounding makes of their weights",
        _verdict(p_beyond < 0.05, False, [estimate]),
        f"Friedman's test over {len(runs)} seeds and {len(names)} layers: p = {p_raw:.3f} for densities, "
        f"{p_beyond:.3f} beyond the null.", lines,
    )  # fmt: skip


def _lags(table: _Table) -> Finding:
    lines, ratios = [], []
    for objective in ("rl", "sft", "pretrain"):
        runs = table.seeds(objective=objective)
        if runs and all("32" in run["shares"] for run in runs.values()):
            value = mean_of([run["shares"]["32"][0] / max(run["shares"]["1"][0], 1e-12) for run in runs.values()])
            null = mean_of([run["shares"]["32"][1] / max(run["shares"]["1"][1], 1e-12) for run in runs.values()])
            ratios.append(value)
            lines += [Line(f"{objective}: changed in 32 steps / in one", value), Line(f"{objective}: null", null)]
    most = max((ratio.high for ratio in ratios), default=math.inf)
    return Finding(
        "lags", "32 steps together change less than 8 times as many weights as one",
        _verdict(most < 8, any(ratio.low > 8 for ratio in ratios), ratios),
        "Weights that change once change again; how much so depends on the learning rate.", tuple(lines),
    )  # fmt: skip


def answers(summaries: Sequence[Summary], centre: Mapping[str, Any]) -> list[Finding]:
    """The findings of a study, in the order in which they are told; those it has no runs for are left out."""
    table = _Table(summaries, centre)
    makers = (
        _learning_or_rounding, _sparse_everywhere, _rl_against_sft, _learning_rate, _kinds_in_order, _layers_differ,
        _sparser_with_time, _lags, _predicts_convergence, _enforced,
    )  # fmt: skip
    found = [make(table) for make in makers]
    return [finding for finding in found if finding.hypothesis and finding.lines]

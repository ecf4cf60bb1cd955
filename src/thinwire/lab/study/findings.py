"""What a study says to each hypothesis: supported, refuted or undecided, with the interval that decides.

Every answer comes of :func:`thinwire.lab.study.summary.summary_of` alone. Seeds are the unit: intervals are Student's
95 % over seeds, differences are taken within a seed. What is beyond the *null*, the share of weights that random
gradients would change at the same data type, learning rate, optimiser and weights, is called *excess*.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from thinwire.lab.study.comparisons import curved_starts, same_weights
from thinwire.lab.study.evidence import (
    Finding,
    Line,
    Table,
    centred,
    density_of,
    excess_of,
    flat,
    per_cent,
    select,
    verdict_of,
)
from thinwire.lab.study.matrix import LEVELS
from thinwire.lab.study.statistics import correlation, friedman, mean_of
from thinwire.lab.study.summary import QUARTERS, Summary

__all__ = ["Finding", "Line", "answers", "per_cent", "select"]


def _kind(name: str, *, beyond_null: bool) -> Callable[[Summary], float]:
    def value(summary: Summary) -> float:
        observed, null = summary["kinds"][name]
        return float(observed - null if beyond_null else observed)

    return value


def _sparse_everywhere(table: Table) -> Finding:
    lines, low, high, narrow = [], 1.0, 0.0, 0
    for axes, runs in table.conditions():
        if axes["weights"] == "fp32" or axes["enforce"] != "none" or axes["control"] != "none":
            continue
        estimate = mean_of([1 - density_of(run) for run in runs.values()])
        low, high = min(low, estimate.value), max(high, estimate.value)
        narrow += estimate.low >= 0.98
        label = f"{axes['objective']}, {axes['optimiser']}, lr {axes['lr']}, {axes['size']}, {axes['weights']}"
        lines.append(Line(label, estimate, "%"))
    fp32 = table.mean(lambda s: 1 - density_of(s), weights="fp32")
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
        verdict_of(all(e.low >= 0.98 for e in estimates), any(e.high < 0.98 for e in estimates), estimates), why,
        tuple(shown[:3] + shown[-3:]),
    )  # fmt: skip


def _learning_or_rounding(table: Table) -> Finding:
    lines = []
    for objective in ("rl", "sft", "pretrain"):
        excess = table.mean(excess_of, objective=objective)
        against = table.paired(density_of, {"objective": objective}, {"objective": objective, "control": "random"})
        if excess is not None:
            lines.append(Line(f"{objective}: observed - null", excess, "%"))
        if against is not None:
            lines.append(Line(f"{objective}: real - random gradients", against, "%"))
    shuffled = table.paired(density_of, {}, {"control": "shuffled"})
    if shuffled is not None:
        lines.append(Line("rl: real - shuffled advantages", shuffled, "%"))
    rl = table.mean(density_of)
    excess = table.mean(excess_of)
    if rl is None or excess is None:
        return Finding("rounding", "", "undecided", "The study has no such runs.")
    if not rl.value:
        return Finding("rounding", "", "undecided", "RL changed no weight.")
    size = max(abs(excess.low), abs(excess.high)) / rl.value
    return Finding(
        "rounding", "in RL, how many weights change follows from rounding alone, to a tenth of it",
        verdict_of(size < 0.1, min(abs(excess.low), abs(excess.high)) / rl.value > 0.1 and excess.sign != 0, [excess]),
        f"RL changes {per_cent(rl)} of the weights in a step; beyond the null are {per_cent(excess)}.", tuple(lines),
    )  # fmt: skip


def _kinds_in_order(table: Table) -> Finding:
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
        verdict_of(all(e.sign > 0 for e in steps), any(e.sign < 0 for e in steps), steps),
        f"{sum(e.sign > 0 for e in steps)} of {len(steps)} neighbours in this order differ as claimed, "
        f"{sum(e.sign < 0 for e in steps)} the other way round.", tuple(lines),
    )  # fmt: skip


def _sparser_with_time(table: Table) -> Finding:
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
        verdict_of(all(e.sign < 0 for e in raw), any(e.sign > 0 for e in raw), raw),
        "Adam's first steps are its largest (its moments are corrected for their start), with random gradients too.",
        tuple(lines),
    )  # fmt: skip


def _rl_against_sft(table: Table) -> Finding:
    lines, raw, beyond = [], [], []
    for optimiser in ("adam", "adamw", "sgd", "adafactor"):
        for level in LEVELS:
            axes = {"optimiser": optimiser, "lr": level}
            one, other = axes | {"objective": "rl"}, axes | {"objective": "sft"}
            difference = table.paired(density_of, one, other)
            excess = table.paired(excess_of, one, other)
            if difference is not None and excess is not None:
                raw.append(difference)
                beyond.append(excess)
                lines.append(Line(f"{optimiser}, lr {level}: density of RL - of SFT", difference, "%"))
    fewer, more = sum(e.sign < 0 for e in raw), sum(e.sign > 0 for e in raw)
    return Finding(
        "rl-sft", "RL is sparser than supervised fine-tuning from the same start, at the same learning rate",
        verdict_of(fewer == len(raw), more == len(raw), raw),
        f"RL is sparser in {fewer} of {len(raw)} pairs of optimiser and learning rate, denser in {more}; beyond the "
        f"null, sparser in {sum(e.sign < 0 for e in beyond)}, denser in {sum(e.sign > 0 for e in beyond)}.",
        tuple(lines),
    )  # fmt: skip


def _predicts_convergence(table: Table) -> Finding:
    groups: dict[tuple[Any, ...], list[Summary]] = {}
    for axes, runs in table.conditions():
        plain = axes["control"] == "none" and axes["enforce"] == "none" and axes["weights"] != "fp32"
        if plain and axes["objective"] == "rl" and axes["steps"] >= QUARTERS:
            groups[tuple(axes.values())] = list(runs.values())
    early = [[run["quarters"][0][0] for run in runs] for runs in groups.values()]
    gains = [[run["gain"] for run in runs] for runs in groups.values()]
    if sum(map(len, early)) < 12:
        return Finding("convergence", "", "undecided", "The study has too few RL runs.")
    across = correlation(flat(early), flat(gains))
    within = correlation(flat(map(centred, early)), flat(map(centred, gains)))
    return Finding(
        "convergence", "how sparse a run is early on predicts how far its reward rises",
        verdict_of(within.sign != 0, False, [within]),
        f"Across all RL runs, the density of the first quarter and the gain correlate by {across.value:+.2f} "
        f"({across.low:+.2f} to {across.high:+.2f}), as the learning rate moves both; within a condition, by "
        f"{within.value:+.2f} ({within.low:+.2f} to {within.high:+.2f}).",
        (Line("Spearman, across conditions", across), Line("Spearman, within conditions", within)),
    )  # fmt: skip


def _slope(points: Sequence[tuple[float, float]]) -> float:
    x, y = np.log([max(p[0], 1e-30) for p in points]), np.log([max(p[1], 1e-9) for p in points])
    return float(np.polyfit(x, y, 1)[0])


def _learning_rate(table: Table) -> Finding:
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
        verdict_of(all(e.sign > 0 for e in slopes), any(e.sign < 0 for e in slopes), slopes),
        "The exponent is that of density ~ lr^exponent over a factor of 100; 1 is proportional, and less than 1 where "
        "most weights change already.", tuple(lines),
    )  # fmt: skip


def _enforced(table: Table) -> Finding:
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
        verdict_of(hurts == len(effects), helps > 0 or not hurts, effects),
        f"Of {len(effects)} ways to choose few weights, {hurts} gain less reward than dense training at the same "
        f"learning rate, {helps} more.", tuple(lines),
    )  # fmt: skip


def _layers_differ(table: Table) -> Finding:
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
        verdict_of(p_beyond < 0.05, False, [estimate]),
        f"Friedman's test over {len(runs)} seeds and {len(names)} layers: p = {p_raw:.3f} for densities, "
        f"{p_beyond:.3f} beyond the null.", lines,
    )  # fmt: skip


def _lags(table: Table) -> Finding:
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
        verdict_of(most < 8, any(ratio.low > 8 for ratio in ratios), ratios),
        "Weights that change once change again; how much so depends on the learning rate.", tuple(lines),
    )  # fmt: skip


def answers(summaries: Sequence[Summary], centre: Mapping[str, Any]) -> list[Finding]:
    """The findings of a study, in the order in which they are told; those it has no runs for are left out."""
    table = Table(summaries, centre)
    makers = (
        _learning_or_rounding, _sparse_everywhere, _rl_against_sft, _learning_rate, _kinds_in_order, _layers_differ,
        _sparser_with_time, _lags, same_weights, _predicts_convergence, curved_starts, _enforced,
    )  # fmt: skip
    found = [make(table) for make in makers]
    return [finding for finding in found if finding.hypothesis and finding.lines]

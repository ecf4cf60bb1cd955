"""Verdicts follow the numbers: studies made up so that the answer is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from thinwire.errors import MisuseError
from thinwire.lab.study.figures import FIGURES, draw_all, estimate_text
from thinwire.lab.study.findings import Finding, answers
from thinwire.lab.study.matrix import LEVELS, Run
from thinwire.lab.study.report import findings_markdown, write_page
from thinwire.lab.study.statistics import Estimate
from thinwire.lab.study.summary import Summary

Density = Callable[[Run], tuple[float, float]]
CENTRE = asdict(Run())


def made_up(density: Density, *, seeds: int = 5, gain: Callable[[Run], float] = lambda _: 0.1) -> list[Summary]:
    """Summaries with the densities (observed, null) that are asked for, each with a little noise of its own."""
    runs = [
        Run(objective=objective, optimiser=optimiser, lr=lr, seed=seed)
        for objective in ("rl", "sft", "pretrain") for optimiser in ("adam", "adamw", "sgd", "adafactor")
        for lr in LEVELS for seed in range(seeds)
    ]  # fmt: skip
    runs += [Run(control="random", seed=s) for s in range(seeds)] + [
        Run(control="shuffled", seed=s) for s in range(seeds)
    ]
    runs += [Run(enforce=e, density=0.1, lr="high", seed=s) for e in ("random", "gradient") for s in range(seeds)]
    runs += [Run(weights="fp32", seed=s) for s in range(seeds)]
    source = np.random.default_rng(0)
    found = []
    for run in runs:
        observed, null = density(run)
        observed *= 1 + 0.002 * source.normal()
        share = [observed, null]
        found.append({
            **asdict(run), "id": "x", "lr_value": 10.0 ** (-6 + LEVELS.index(run.lr)), "parameters": 1000,
            "before": 0.3, "after": 0.3 + gain(run), "gain": gain(run) + 0.001 * source.normal(), "greedy_gain": 0.0,
            "loss": [1.0, 0.5],
            "shares": {"1": share, "8": [4 * observed, 4 * null], "32": [6 * observed, 6 * null]}, "first": share,
            "quarters": [share] * 4, "rank": 0.5, "seconds": 1.0,
            "kinds": {"attention": [1.2 * observed, null], "mlp": [1.1 * observed, null], "norm": [observed, null]},
            "layers": {"0": share, "1": [1.1 * observed, null], "outside": share},
        })  # fmt: skip
    return found


def by_name(summaries: list[Summary]) -> dict[str, Finding]:
    return {finding.name: finding for finding in answers(summaries, CENTRE)}


def rounding_only(run: Run) -> tuple[float, float]:
    if run.weights == "fp32":
        return 0.99, 0.99
    share = 0.001 * 3.0 ** LEVELS.index(run.lr)
    return share, share


def learning(run: Run) -> tuple[float, float]:
    share = 0.02 * 3.0 ** LEVELS.index(run.lr)
    return share * (1.5 if run.objective == "rl" and run.control == "none" else 1.0), share


def test_a_world_of_rounding_is_told_from_a_world_of_learning() -> None:
    one, other = by_name(made_up(rounding_only)), by_name(made_up(learning))
    assert (one["rounding"].verdict, other["rounding"].verdict) == ("supported", "refuted")
    assert (one["sparse-everywhere"].verdict, other["sparse-everywhere"].verdict) == ("supported", "refuted")
    assert (one["rl-sft"].verdict, other["rl-sft"].verdict) == ("undecided", "refuted")
    assert one["learning-rate"].verdict == other["learning-rate"].verdict == "supported"
    assert one["kinds"].verdict == "supported"
    assert other["lags"].verdict == "supported"
    exponents = [line.estimate.value for line in one["learning-rate"].lines]
    assert exponents == pytest.approx([np.log(3) / np.log(10)] * len(exponents), rel=0.02)


def test_nothing_is_claimed_of_fewer_than_five_seeds() -> None:
    found = by_name(made_up(learning, seeds=4))
    assert {f.verdict for name, f in found.items() if name not in ("convergence",)} == {"undecided"}


def test_what_costs_reward_is_said_to() -> None:
    def costly(run: Run) -> float:
        return 0.05 if run.enforce != "none" else 0.1

    assert by_name(made_up(learning, gain=costly))["enforced"].verdict == "supported"
    assert by_name(made_up(learning, gain=lambda run: 0.2 - costly(run)))["enforced"].verdict == "refuted"


def test_density_that_goes_with_the_gain_is_found_within_conditions() -> None:
    summaries = made_up(learning)
    for summary in summaries:
        summary["quarters"] = [[summary["shares"]["1"][0] * (1 + 0.1 * summary["seed"]), 0.01]] * 4
        summary["gain"] = 0.01 * summary["seed"]
    assert by_name(summaries)["convergence"].verdict == "supported"
    assert by_name(made_up(learning))["convergence"].verdict == "undecided"


def overlapping(rl: float, noise: float) -> list[Summary]:
    """Five seeds of two RL runs and one of random gradients, with the overlaps that are asked for."""
    summaries = []
    for seed in range(5):
        rows = {run: made_up(learning, seeds=1)[0] | asdict(run) for run in (
            Run(seed=seed), Run(seed=seed, repeat=1), Run(seed=seed, control="random"))}  # fmt: skip
        one = next(iter(rows.values()))
        one["overlaps"] = [
            {"axis": axis, "with": other, "step": [0.2, 0.1], "whole": [value + 0.001 * seed, 0.1]}
            for axis, other, value in (("repeat", 1, rl), ("control", "random", noise))
        ]
        summaries += rows.values()
    return summaries


def test_a_subnetwork_of_its_own_is_more_overlap_than_with_random_gradients() -> None:
    own, rounding, less = (by_name(overlapping(rl, 0.4))["overlap"] for rl in (0.6, 0.4, 0.3))
    assert (own.verdict, rounding.verdict, less.verdict) == ("supported", "undecided", "refuted")
    assert own.lines[0].estimate.value == pytest.approx(0.2)
    labels = [line.label for line in own.lines]
    assert "chance, the whole run" in labels
    assert "rl: random gradients instead, one step" in labels
    assert "overlap" not in by_name(made_up(learning))


def test_curvature_that_goes_with_density_is_found_over_starts() -> None:
    def world(sign: float) -> list[Summary]:
        found = []
        for size in ("small", "mid", "large"):
            for summary in made_up(learning, seeds=5):
                if summary["objective"] == "pretrain" or summary["control"] != "none":
                    continue
                share = 1 + 0.05 * summary["seed"]
                sharp = {"small": 1.0, "mid": 10.0, "large": 100.0}[size] * (1 + sign * 0.1 * summary["seed"])
                curved = dict.fromkeys(("hessian_trace", "hessian_largest", "fisher_trace", "fisher_largest"), sharp)
                observed, null = summary["shares"]["1"]
                shares = summary["shares"] | {"1": [share * observed, null]}
                found.append(summary | {"size": size, "shares": shares, "curvature": [curved, curved]})
        return found

    found = by_name(world(1.0))["curvature"]
    assert found.verdict == "supported"
    assert found.lines[0].estimate.count == 15  # starts, not runs
    assert "rl: trace of the objective's Hessian after" in [line.label for line in found.lines]
    assert by_name(world(-1.0))["curvature"].verdict == "refuted"
    assert "curvature" not in by_name(made_up(learning))


def test_a_study_of_a_few_runs_answers_what_it_can(tmp_path: Path) -> None:
    few = [
        s for s in made_up(learning) if s["objective"] == "rl" and s["control"] == "none" and s["optimiser"] == "adamw"
    ]
    found = answers(few, CENTRE)
    assert "rounding" in {f.name for f in found}
    assert "rl-sft" not in {f.name for f in found}
    draw_all(few, CENTRE, tmp_path)
    with pytest.raises(MisuseError):
        draw_all([], CENTRE, tmp_path)


def test_the_report_tells_every_verdict_and_shows_every_figure(tmp_path: Path) -> None:
    summaries = made_up(learning)
    findings = answers(summaries, CENTRE)
    text = findings_markdown(findings)
    assert all(f.hypothesis in text and f"### {f.name}" in text for f in findings)
    assert text.count("**refuted**") >= 2
    pictures = draw_all(summaries, CENTRE, tmp_path / "figures")
    assert [p.stem for p in pictures] == list(FIGURES)
    assert all((tmp_path / "figures" / f"{name}.pdf").read_bytes()[:4] == b"%PDF" for name in FIGURES)
    write_page(summaries, findings, pictures, tmp_path / "report.html", {"title": "<b>"})
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in page
    assert page.count("<figure>") == len(FIGURES)
    assert all(f"id='{f.name}'" in page for f in findings)


def test_estimates_are_written_with_their_interval() -> None:
    assert estimate_text(Estimate(0.0123, 0.0101, 0.0146, 5), "%") == "1.23 % (1.01 to 1.46)"

"""How fast sparse steps converge, with error feedback and without, beside dense ones: the rates of docs/theory.md.

Two problems on which one step in ten cells is misled unless it remembers: a tenth of the cells has large gradients that
say nothing. Each horizon ``T`` has its own step size ``c / sqrt(T)``, as the theorem asks; what is measured is the mean
over the run of the squared norm of the true gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from rich.table import Table

from thinwire.bench.measure import machine, versions
from thinwire.errors import MisuseError
from thinwire.optim import ASPG

__all__ = ["METHODS", "PROBLEMS", "ConvergenceOptions", "convergence_table", "run_convergence", "slope"]

Row = dict[str, Any]
Gradients = tuple[torch.Tensor, torch.Tensor]  # the one that is stepped by, and the true one

METHODS = ("dense", "feedback", "no feedback")
_CELLS, _NOISY = 100, 10


@dataclass(frozen=True, slots=True)
class ConvergenceOptions:
    """Horizons in steps, seeds that are averaged over, and the density of the sparse methods."""

    horizons: tuple[int, ...] = (250, 1000, 4000)
    seeds: int = 2
    density: float = 0.1

    def __post_init__(self) -> None:
        if len(self.horizons) < 2 or min(self.horizons) < 2 or self.seeds < 1 or not 0 < self.density < 1:
            raise MisuseError("two horizons of 2 steps or more, a seed, and a density between 0 and 1 are needed")


class _Quadratic:
    """``sum(l x^2) / 2`` with curvatures ``l`` from 1 to 0.1; the ten first cells have noise of size 3 and random sign.
    Everywhere else the gradient is exact."""

    rate = 4.0  # times 1 / sqrt(T)

    def __init__(self) -> None:
        self.curvature = torch.logspace(-1, 0, _CELLS).flip(0)
        self.start = torch.ones(_CELLS)

    def gradients(self, x: torch.Tensor, random: torch.Generator) -> Gradients:
        true = self.curvature * x
        noise = torch.zeros(_CELLS)
        noise[:_NOISY] = 3.0 * (2.0 * torch.randint(0, 2, (_NOISY,), generator=random) - 1)
        return true + noise, true


class _Logistic:
    """Logistic regression on 512 rows, l2-regularised, in batches of 8; a tenth of the features is large and unrelated
    to the labels."""

    rate = 20.0

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(1234)
        self.rows = torch.randn(512, _CELLS, generator=random) / 10
        self.labels = (self.rows[:, _NOISY:].sum(1) > 0).float()
        self.rows[:, :_NOISY] *= 10
        self.start = torch.zeros(_CELLS)

    def gradients(self, x: torch.Tensor, random: torch.Generator) -> Gradients:
        batch = torch.randint(0, 512, (8,), generator=random)
        residue = torch.sigmoid(self.rows @ x) - self.labels
        true = self.rows.T @ residue / 512 + 1e-3 * x
        return self.rows[batch].T @ residue[batch] / 8 + 1e-3 * x, true


PROBLEMS: dict[str, Callable[[], _Quadratic | _Logistic]] = {"quadratic": _Quadratic, "logistic": _Logistic}


def _run(problem: _Quadratic | _Logistic, method: str, horizon: int, density: float, seed: int) -> float:
    x = torch.nn.Parameter(problem.start.clone())
    optimizer = ASPG(
        [x], lr=problem.rate / horizon**0.5, style="sgd", weight_decay=0.0, refresh_every=1, stickiness=1.0,
        betas=(0.9, 0.0), density=1.0 if method == "dense" else density, error_feedback=method == "feedback",
    )  # fmt: skip
    random, total = torch.Generator().manual_seed(seed), 0.0
    for _ in range(horizon):
        x.grad, true = problem.gradients(x.detach(), random)
        total += float(true.square().sum())
        optimizer.step()
    return total / horizon


def slope(horizons: Sequence[int], values: Sequence[float]) -> float:
    """The least-squares slope of ``log(values)`` against ``log(horizons)``.

    >>> round(slope([1, 4, 16], [8.0, 4.0, 2.0]), 6)
    -0.5
    """
    xs, ys = [log(t) for t in horizons], [log(v) for v in values]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def run_convergence(options: ConvergenceOptions, report: Callable[[str], None] = lambda _: None) -> list[Row]:
    """A row a problem and method: the mean squared gradient at each horizon, and its slope."""
    rows, before = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, make in PROBLEMS.items():
            problem = make()
            for method in METHODS:
                report(f"{name}, {method}")
                found = [
                    sum(_run(problem, method, t, options.density, seed) for seed in range(options.seeds))
                    / options.seeds
                    for t in options.horizons
                ]
                rows.append(
                    {
                        "problem": name, "method": method, "density": 1.0 if method == "dense" else options.density,
                        "horizons": list(options.horizons), "seeds": options.seeds,
                        "squared_gradient": [float(f"{value:.4g}") for value in found],
                        "slope": round(slope(options.horizons, found), 3),
                        "last_slope": round(slope(options.horizons[-2:], found[-2:]), 3),
                        "machine": machine(), "versions": versions(),
                    }
                )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return rows


def convergence_table(rows: Sequence[Row]) -> Table:
    """One line a row: the mean squared gradient at each horizon, and the slopes."""
    table = Table(title="Mean squared gradient", title_justify="left")
    for heading in ("problem", "method", *(f"T = {t}" for t in rows[0]["horizons"]), "slope", "of the last two"):
        table.add_column(heading, justify="right")
    for row in rows:
        values = [f"{value:.3g}" for value in row["squared_gradient"]]
        table.add_row(row["problem"], row["method"], *values, f"{row['slope']:.2f}", f"{row['last_slope']:.2f}")
    return table

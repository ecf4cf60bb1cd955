"""A sparse optimiser's step beside torch's fused dense one, on one large tensor, with its selections counted in.

Before anything is timed, a step at the same density is compared with the readable oracle's, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from thinwire.bench.measure import load, machine, seconds, versions
from thinwire.errors import MisuseError
from thinwire.optim import ASPG, oracle

__all__ = ["SparseUpdateOptions", "run_sparse_update", "sparse_update_table"]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SparseUpdateOptions:
    """What to measure: fp32 elements, densities, steps between selections, threads, repeats."""

    numel: int = 100_000_000
    densities: tuple[float, ...] = (0.001, 0.01, 0.1)
    refresh_every: int = 100
    threads: int = 2
    repeats: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.numel < 1000 or self.repeats < 1 or self.threads < 1 or self.refresh_every < 1:
            raise MisuseError("numel must be at least 1000; repeats, threads and refresh_every at least 1")
        if not self.densities or not all(0 < d < 1 for d in self.densities):
            raise MisuseError(f"densities must lie between 0 and 1, not {self.densities}")


def _parameter(options: SparseUpdateOptions) -> torch.nn.Parameter:
    random = torch.Generator().manual_seed(options.seed)
    p = torch.nn.Parameter(torch.randn(options.numel, generator=random) * 0.02)
    p.grad = torch.randn(options.numel, generator=random)
    return p


def _verify(p: torch.nn.Parameter, density: float) -> None:
    """The optimiser's second step equals the oracle's."""
    mine = torch.nn.Parameter(p.detach().clone())
    mine.grad = p.grad
    assert p.grad is not None
    optimizer = ASPG([mine], lr=1e-5, density=density)
    optimizer.step()
    state, weights = (
        {k: x.clone() for k, x in optimizer.state[mine].items() if torch.is_tensor(x)},
        mine.detach().clone(),
    )
    optimizer.step()
    ages = torch.arange(3, dtype=torch.float64)
    rates, corrections = 1e-5 / (1 - 0.9**ages), (1 - 0.999**ages).sqrt()
    step = oracle.AdamStep(rates.float(), corrections.float(), 0.9, 0.999, 1e-8, 1 - 1e-5 * 0.01)
    values, _ = oracle.gather(p.grad, state["positions"])
    oracle.adam(weights, state["positions"], values, state["exp_avg"], state["exp_avg_sq"], state["entered"], 2, step)
    if not torch.equal(weights, mine.detach()):
        raise AssertionError("the sparse step differs from the oracle's; nothing was timed")


def run_sparse_update(options: SparseUpdateOptions, report: Callable[[str], None] = lambda _: None) -> list[Row]:
    """A row a density: seconds of a step, of one with a selection, and of the dense optimiser in the same round."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return [_row(options, density, report) for density in options.densities]
    finally:
        torch.set_num_threads(before)


def _row(options: SparseUpdateOptions, density: float, report: Callable[[str], None]) -> Row:
    report(f"density {density:g}: verifying")
    p = _parameter(options)
    _verify(p, density)
    dense = torch.optim.AdamW([p], lr=1e-5, fused=True)
    dense.step()
    sparse = ASPG([p], lr=1e-5, density=density, refresh_every=1 << 40)
    sparse.step()
    sparse.step()

    old = p.grad
    assert old is not None
    random = torch.Generator().manual_seed(options.seed + 1)
    other = torch.randn(options.numel, generator=random).mul_(0.6).add_(old, alpha=0.8)

    def refresh() -> None:
        p.grad = other if p.grad is old else old  # another batch's, of correlation 0.8, so that the set moves
        sparse.param_groups[0]["chosen_density"] = 0.0  # a set chosen at another density is chosen anew
        sparse.step()

    report(f"density {density:g}: timing")
    refresh()
    before = sparse.state[p]["positions"]
    refresh()
    new = int((~torch.isin(sparse.state[p]["positions"], before, assume_unique=True)).sum())
    runs: dict[str, list[float]] = {"dense": [], "step": [], "refresh": []}
    for _ in range(options.repeats):  # in turn, so that a busy moment does not meet one of them alone
        for name, run in (("dense", dense.step), ("step", sparse.step), ("refresh", refresh)):
            runs[name].append(seconds(run))
    found = {name: sorted(times) for name, times in runs.items()}
    best_s = {name: round(times[0], 6) for name, times in found.items()}
    median_s = {name: round(times[len(times) // 2], 6) for name, times in found.items()}

    def amortised(s: dict[str, float]) -> float:
        return s["step"] + (s["refresh"] - s["step"]) / options.refresh_every

    dense_state = sum(x.numel() * x.element_size() for x in dense.state[p].values())
    return {
        "numel": options.numel, "density": density, "active": sparse.active_cells(), "entered": new,
        "threads": options.threads,
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",  # torch asks for them where this is set
        "refresh_every": options.refresh_every, "best_s": best_s, "median_s": median_s, "runs": options.repeats,
        "amortised_s": {"best": round(amortised(best_s), 6), "median": round(amortised(median_s), 6)},
        "times_faster": {
            "best": round(best_s["dense"] / amortised(best_s), 2),
            "median": round(median_s["dense"] / amortised(median_s), 2),
        },
        "state_bytes": sparse.state_bytes(), "dense_state_bytes": dense_state, "verified": True,
        "load": load(), "machine": machine(), "versions": versions(),
    }  # fmt: skip


def sparse_update_table(rows: Sequence[Row]) -> Table:
    """One line a row: best milliseconds (median), times faster, and state."""
    table = Table(title="A step, best (median) ms", title_justify="left")
    for heading in ("elements", "density", "threads", "AdamW, fused", "ASPG", "with selection", "×", "state", "dense"):
        table.add_column(heading, justify="right")
    for row in rows:
        names = ("dense", "step", "refresh")
        times = [f"{1000 * row['best_s'][n]:.3g} ({1000 * row['median_s'][n]:.3g})" for n in names]
        faster = f"{row['times_faster']['best']:.1f} ({row['times_faster']['median']:.1f})"
        sizes = [f"{row[n] / 1e6:.3g} MB" for n in ("state_bytes", "dense_state_bytes")]
        table.add_row(f"{row['numel'] / 1e6:g} M", f"{row['density']:.2%}", str(row["threads"]), *times, faster, *sizes)
    return table

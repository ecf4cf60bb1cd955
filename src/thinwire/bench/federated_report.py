"""Rows of the federated benchmark as tables and figures: at equal rounds, at equal bytes, and client by client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

__all__ = [
    "fairness_markdown", "federated_figure", "federated_markdown", "federated_table", "inversion_markdown",
    "participation_markdown", "summarise",
]  # fmt: skip

Row = dict[str, Any]
_LAST = 3  # evaluations that a final accuracy is the mean of
_HEADING = (
    "method", "seeds", "accuracy, %", "less than FedAvg", "at equal bytes", "up-link", "up + down", "worst 10 %",
    "simulated time",
)  # fmt: skip


def accuracy_of(row: Row) -> float:
    """The mean accuracy of a run's last evaluations."""
    return float(mean(point["accuracy"] for point in row["points"][-_LAST:]))


def accuracy_at(row: Row, nbytes: float) -> float:
    """A run's accuracy by the time it had sent ``nbytes`` both ways: that of the last round that was paid for."""
    paid = [point["accuracy"] for point in row["points"] if point["up"] + point["down"] <= nbytes]
    return float(paid[-1]) if paid else float("nan")


def _bytes(row: Row, *ways: str) -> int:
    return sum(int(row["points"][-1][way]) for way in ways)


def summarise(rows: Sequence[Row], *, reference: str = "fedavg") -> list[Row]:
    """A line a method, in the order of the rows: means over the seeds that the reference has too.

    ``accuracy``, ``error`` (standard error), ``below`` and ``below_error`` (points less than the reference, paired by
    seed), ``equal_bytes`` (accuracy when it had sent as much as the thriftiest of all methods in total), ``up`` and
    ``total`` (how many times fewer bytes than the reference), ``worst`` and ``clock_s``.
    """
    by: dict[str, dict[int, Row]] = {}
    for row in rows:
        by.setdefault(row["method"], {})[row["seed"]] = row
    base = by.get(reference, {})
    thrift = min(_bytes(row, "up", "down") for row in rows)
    lines = []
    for method, runs in by.items():
        seeds = sorted(set(runs) & set(base)) or sorted(runs)
        found = [accuracy_of(runs[s]) for s in seeds]
        gaps = [accuracy_of(base[s]) - accuracy_of(runs[s]) for s in seeds if s in base]

        def ratio(*ways: str, runs: dict[int, Row] = runs, seeds: list[int] = seeds) -> float | None:
            known = [s for s in seeds if s in base]
            return mean(_bytes(base[s], *ways) / _bytes(runs[s], *ways) for s in known) if known else None

        lines.append({
            "method": method, "seeds": len(seeds), "accuracy": mean(found), "error": _error(found),
            "below": mean(gaps) if gaps else None, "below_error": _error(gaps),
            "equal_bytes": mean(accuracy_at(runs[s], thrift) for s in seeds), "up": ratio("up"),
            "total": ratio("up", "down"), "worst": mean(runs[s]["fairness"]["worst"] for s in seeds),
            "mean_client": mean(runs[s]["fairness"]["mean"] for s in seeds),
            "clock_s": mean(runs[s]["points"][-1]["clock_s"] for s in seeds),
        })  # fmt: skip
    return lines


def _error(values: Sequence[float]) -> float | None:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    def points(value: float | None, error: float | None) -> str:
        text = "" if value is None else f"{100 * value:.1f}"
        return text if error is None or value is None else f"{text} ± {100 * error:.1f}"

    def times(value: float | None) -> str:
        return "" if value is None else f"1/{value:.0f}" if value >= 1.5 else "1"

    return [
        [
            line["method"], str(line["seeds"]), points(line["accuracy"], line["error"]),
            points(line["below"], line["below_error"]), points(line["equal_bytes"], None), times(line["up"]),
            times(line["total"]), points(line["worst"], None), f"{line['clock_s'] / 60:.0f} min",
        ]
        for line in summarise(rows)
    ]  # fmt: skip


def federated_table(rows: Sequence[Row]) -> Table:
    """One line a method."""
    table = Table(title=_title(rows), title_justify="left")
    for i, heading in enumerate(_HEADING):
        table.add_column(heading, justify="right" if i else "left")
    for cells in _cells(rows):
        table.add_row(*cells, style="bold" if cells[0] == "sparsesync" else "")
    return table


def federated_markdown(rows: Sequence[Row]) -> str:
    """The table of ``docs/federated.md``; a test holds the two together."""
    lines = [list(_HEADING), ["---", *["---:"] * (len(_HEADING) - 1)], *_cells(rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _title(rows: Sequence[Row]) -> str:
    row = rows[0]
    return (
        f"{row['data']}, {row['clients']} clients ({row['partition']}), {row['rounds']} rounds, "
        f"local epochs: {row['epochs']}, {row['parameters']:,} weights, density {100 * row['settings']['density']:g} %"
    )


_COLORS = ("#374151", "#0f766e", "#2a9fd8", "#c0392b", "#b45309", "#7c3aed", "#be185d", "#65a30d")


def federated_figure(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against rounds and against bytes, mean over seeds with their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.0), sharey=True, layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for k, method in enumerate(methods):
        runs = [row["points"] for row in rows if row["method"] == method]
        style = {"color": _COLORS[k % len(_COLORS)], "ls": "-" if k < len(_COLORS) else "--"}
        turns = range(min(map(len, runs)))
        low, middle, high = ([100 * which([run[t]["accuracy"] for run in runs]) for t in turns] for which in _RANGE)
        for axes, x in (
            (left, [runs[0][t]["round"] for t in turns]),
            (right, [mean(run[t]["up"] + run[t]["down"] for run in runs) / 1e6 for t in turns]),
        ):
            shown = slice(1 if axes is right else 0, None)  # nothing is sent before the first round
            axes.plot(
                x[shown], middle[shown], label=method, lw=1.8 if method in ("fedavg", "sparsesync") else 1.1, **style
            )
            axes.fill_between(x[shown], low[shown], high[shown], color=style["color"], alpha=0.12, lw=0)
    left.set_xlabel("rounds")
    right.set_xlabel("sent by all clients and the server together, MB")
    right.set_xscale("log")
    left.set_ylabel("accuracy on the test set, %")
    right.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(rows), fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


_RANGE: tuple[Callable[[Sequence[float]], float], ...] = (min, mean, max)


def inversion_markdown(rows: Sequence[Row]) -> str:
    """PSNR and SSIM of each attack by density and local steps."""
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    lines = ["| local steps | density | " + " | ".join(attacks) + " |", "|---:|---:|" + "---:|" * len(attacks)]
    for steps, density in dict.fromkeys((row["steps"], row["density"]) for row in rows):
        cells = []
        for attack in attacks:
            found = [r for r in rows if (r["attack"], r["steps"], r["density"]) == (attack, steps, density)]
            cells.append(f"{found[0]['psnr']:.1f} dB, {found[0]['ssim']:.2f}" if found else "")
        lines.append(f"| {steps} | {100 * density:g} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def participation_markdown(rows: Sequence[Row]) -> str:
    """SparseSync beside FedAvg by partition and by how many clients take part in a round; means over seeds."""
    lines = [
        "| partition | clients in a round | FedAvg, % | SparseSync, % | worst 10 %: FedAvg | SparseSync | up + down |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for how, share in dict.fromkeys((row["partition"], row["settings"]["participation"]) for row in rows):
        some = [r for r in rows if (r["partition"], r["settings"]["participation"]) == (how, share)]
        by = {line["method"]: line for line in summarise(some)}
        dense, sparse = by["fedavg"], by["sparsesync"]
        cells = [how, f"{share * some[0]['clients']:.0f} of {some[0]['clients']}"]
        cells += [f"{100 * line[key]:.1f}" for key in ("accuracy", "worst") for line in (dense, sparse)]
        lines.append("| " + " | ".join([*cells, f"1/{sparse['total']:.0f}"]) + " |")
    return "\n".join(lines)


def fairness_markdown(rows: Sequence[Row]) -> str:
    """What clients see of the last model against density: their mean, worst tenth and variance; means over seeds."""
    lines = [
        "| method | density | clients' mean, % | worst 10 %, % | deviation, points | bytes up, a weight and round |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, density in dict.fromkeys((row["method"], row["settings"]["density"]) for row in rows):
        some = [r for r in rows if (r["method"], r["settings"]["density"]) == (method, density)]
        shares = [mean(row["fairness"][key] for row in some) for key in ("mean", "worst")]
        spread = mean(row["fairness"]["variance"] ** 0.5 for row in some)
        sent = mean(_bytes(row, "up") / row["parameters"] / row["rounds"] / row["clients"] for row in some)
        shown = "all" if method == "fedavg" else f"{100 * density:g} %"
        cells = [method, shown, *(f"{100 * share:.1f}" for share in shares), f"{100 * spread:.1f}", f"{sent:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

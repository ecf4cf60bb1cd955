"""From 1 to 64 workers: measured as far as this machine goes, simulated beyond, and the two held together.

Seconds are measured by :mod:`thinwire.bench.gradients` at a few numbers of workers. The model of
:mod:`thinwire.bench.scaling_model` is fitted to all but the largest of them; the largest is held out, and what the
model says of it stands beside what was measured. Bytes beyond the measured are not a formula's for the sparse methods:
the real algorithm runs between threads (:mod:`thinwire.bench.scaling_bytes`), at the measured numbers of workers, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from rich.table import Table

from thinwire.bench.gradients import run_gradients
from thinwire.bench.gradients_exchange import FLOAT, numel_of
from thinwire.bench.gradients_methods import METHODS
from thinwire.bench.gradients_ours import Mode
from thinwire.bench.gradients_worker import GradientOptions
from thinwire.bench.gradients_workload import cut, resnet50_shapes
from thinwire.bench.measure import load, machine, versions
from thinwire.bench.scaling_bytes import bytes_in_memory
from thinwire.bench.scaling_model import SIMULATED, Model, Point, Setting, fit
from thinwire.errors import MisuseError

__all__ = ["ScalingOptions", "run_scaling", "scaling_table", "simulate"]

Row = dict[str, Any]
Report = Callable[[str], None]

_BETWEEN_THREADS: dict[str, Mode] = {"split": "split", "shared": "shared"}
_MEMORY_WIDTH = 32  # of ResNet-50's first layer, where 16 or more workers are to fit in one machine's memory


@dataclass(frozen=True, slots=True)
class ScalingOptions:
    """Numbers of workers to measure and to simulate, and what is exchanged. Of ``bytes_only``, no time is reported."""

    rate: str = "1gbit"
    measured: tuple[int, ...] = (1, 2, 4, 8)
    bytes_only: tuple[int, ...] = (16,)
    simulated: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    density: float = 0.01
    repeats: int = 5
    bucket_mb: float = 25.0
    width: int = 64
    seed: int = 0


def run_scaling(options: ScalingOptions, report: Report = lambda _: None) -> list[Row]:
    """Rows of kind ``measured`` and ``simulated``, one a method and number of workers, and one of kind ``model``.

    Raises:
        MisuseError: Fewer than two numbers of workers above 1 to measure, or no slow network can be made here.
        RankError: A rank failed.
        WrongResultError: A method did not compute what it should.
    """
    _held_out(options.measured)
    measured = _measure(options, report)
    common = {
        "bench": "scaling",
        "rate": options.rate,
        "density": options.density,
        "bucket_mb": options.bucket_mb,
        "width": options.width,
        "seed": options.seed,
        "machine": machine(),
        "package_versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return simulate([common | row for row in measured], options.simulated, report)


def simulate(rows: Sequence[Row], simulated: Sequence[int], report: Report = lambda _: None) -> list[Row]:
    """The rows of kind ``measured`` among ``rows``, with simulated ones made anew from them.

    Raises:
        MisuseError: They were measured at fewer than two numbers of workers above 1.
    """
    measured = [row for row in rows if row["kind"] == "measured"]
    points = [Point(row["method"], row["workers"], row["best_s"]) for row in measured if row["best_s"]]
    held_out = _held_out({point.workers for point in points})
    first = measured[0]
    shapes = resnet50_shapes(first["width"])
    flat = torch.empty(sum(prod(shape) for shape in shapes), device="meta")
    setting = Setting(cut(flat, shapes, first["bucket_mb"]), first["density"], first["machine"]["cores"])
    model = fit([point for point in points if point.workers < held_out], setting)
    facts = ("bench", "rate", "density", "bucket_mb", "width", "seed", "machine", "package_versions", "date")
    common = {key: first[key] for key in facts} | {"numel": flat.numel()}
    told = _simulate(first, model, simulated, report)
    checks = {**_validation(model, points, held_out), **_bytes_validation([*measured, *told])}
    return [common | row for row in (*measured, *told, {"kind": "model", **checks})]


def _held_out(measured: Iterable[int]) -> int:
    several = sorted(workers for workers in set(measured) if workers > 1)
    if len(several) < 2:
        raise MisuseError(f"measured at {several} workers; give two numbers above 1, of which the larger is held out")
    return several[-1]


def _measure(options: ScalingOptions, report: Report) -> list[Row]:
    rows = []
    for workers in (*options.measured, *options.bytes_only):
        timed = workers in options.measured
        width = options.width if timed else min(options.width, _MEMORY_WIDTH)
        how = GradientOptions(
            SIMULATED, options.density, options.repeats if timed else 1,
            bucket_mb=options.bucket_mb, width=width, seed=options.seed,
        )  # fmt: skip
        rate = options.rate if timed else "none"
        before = load()
        found = run_gradients(
            how, workers, rate, report=lambda text, workers=workers: report(f"{workers} workers: {text}")  # type: ignore[misc]
        )  # fmt: skip
        for row in found:
            rows.append(
                {
                    "kind": "measured",
                    "method": row["method"],
                    "workers": workers,
                    "best_s": row["best_s"] if timed else None,
                    "median_s": row["median_s"] if timed else None,
                    "cpu_s": row["cpu_s"],
                    "share_received": row["received_bytes"] / (FLOAT * row["numel"]),
                    "measured_numel": row["numel"],
                    "load": [before, load()],
                }
            )
    return rows


def _simulate(first: Row, model: Model, simulated: Sequence[int], report: Report) -> list[Row]:
    rows = []
    numel = numel_of(model.setting.buckets)
    for method, workers in product(SIMULATED, simulated):
        how = "arithmetic"
        share = METHODS[method].theory(workers, model.setting.buckets, first["density"]) / (FLOAT * numel)
        mode = _BETWEEN_THREADS.get(method)
        if mode is not None and workers > 1:
            report(f"bytes of {method} between {workers} threads")
            how = "the real algorithm between threads"
            width = min(first["width"], _MEMORY_WIDTH)
            share = bytes_in_memory(mode, workers, density=first["density"], width=width, seed=first["seed"])
        rows.append(
            {
                "kind": "simulated",
                "method": method,
                "workers": workers,
                "own_cores_s": model.seconds(method, workers, own_cores=True),
                "shared_cores_s": model.seconds(method, workers, own_cores=False),
                "share_received": share,
                "bytes_from": how,
            }
        )
    return rows


def _validation(model: Model, points: Sequence[Point], held_out: int) -> Row:
    """The relative errors of the fitted and of the held-out points."""
    errors = {
        kind: {
            f"{p.method} at {p.workers}": model.error(p)
            for p in points
            if p.workers > 1 and (p.workers == held_out) == is_held
        }
        for kind, is_held in (("fitted", False), ("held_out", True))
    }
    return {"coefficients": model.row(), "errors": errors, "held_out_workers": held_out}


def _bytes_validation(rows: Sequence[Row]) -> Row:
    """Bytes between threads against bytes through the lines, wherever both are known."""
    simulated = {(row["method"], row["workers"]): row["share_received"] for row in rows if row["kind"] == "simulated"}
    errors = {
        f"{row['method']} at {row['workers']}": simulated[key] / row["share_received"] - 1
        for row in rows
        if row["kind"] == "measured" and row["workers"] > 1 and (key := (row["method"], row["workers"])) in simulated
    }
    return {"bytes_errors": errors}


def scaling_table(rows: Sequence[Row]) -> Table:
    """One line a number of workers and method: measured and simulated side by side."""
    first, model = rows[0], next(row for row in rows if row["kind"] == "model")
    found = {(row["kind"], row["method"], row["workers"]): row for row in rows if row["kind"] != "model"}
    table = Table(
        title=f"{first['numel']:,} gradients, {first['rate']}, density {first['density']:.3g}: ms an exchange, and "
        "bytes received by a worker in % of its float32 gradients",
        title_justify="left",
        caption_justify="left",
    )
    headings = (
        "method",
        "workers",
        "best ms",
        "simulated",
        "error %",
        "own cores",
        "received %",
        "simulated",
        "x fp32",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in SIMULATED:
        for workers in sorted({number for _, name, number in found if name == method}):
            table.add_row(*_cells(found, method, workers), end_section=workers == max(n for _, _, n in found))
    held = model["errors"]["held_out"].values()
    table.caption = (
        f"Simulated: an alpha-beta model, fitted to fewer than {model['held_out_workers']} workers; at the held-out "
        f"{model['held_out_workers']} it is off by {100 * max(map(abs, held)):.0f} % at most. 'simulated' has all "
        f"ranks on {first['machine']['cores']} cores as measured, 'own cores' each on cores of its own; x fp32: "
        "simulated, own cores. Bytes of split and shared are simulated by the real algorithm between threads."
    )
    return table


def _cells(found: dict[tuple[str, str, int], Row], method: str, workers: int) -> list[str]:
    measured = found.get(("measured", method, workers), {})
    simulated = found.get(("simulated", method, workers), {})
    dense = found.get(("simulated", "fp32", workers), {}).get("own_cores_s")
    seconds, told, own = measured.get("best_s"), simulated.get("shared_cores_s"), simulated.get("own_cores_s")

    def number(value: float | None, factor: float, digits: int) -> str:
        return "–" if value is None else f"{factor * value:.{digits}f}"

    return [
        METHODS[method].title,
        str(workers),
        number(seconds, 1e3, 1),
        number(told, 1e3, 1),
        "–" if not seconds or not told else f"{100 * (told / seconds - 1):+.0f}",
        number(own, 1e3, 1),
        number(measured.get("share_received"), 100, 2),
        number(simulated.get("share_received"), 100, 2),
        "–" if not own or not dense else f"{dense / own:.1f}",
    ]

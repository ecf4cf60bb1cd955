"""What the instruments cost and how right they are: comparison, trackers, the null, effective ranks.

Each is one run with one thread: a comparison beside a copy of memory and torch's own, trackers beside a training step
of a small Llama, the null beside what real training changes, ranks beside the full SVD.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from thinwire.bench.measure import machine, versions
from thinwire.errors import MisuseError
from thinwire.lab.models import tiny_llama
from thinwire.lab.recipes import nano_recipe
from thinwire.lab.training import learn_from_answers
from thinwire.probe.changes import compare
from thinwire.probe.null import gradient_sizes, predict_null
from thinwire.probe.rank import KINDS, effective_rank, rank_of
from thinwire.probe.snapshots import FastSnapshot
from thinwire.probe.spectrum import Spectrum
from thinwire.probe.tracker import SparsityTracker

__all__ = ["PARTS", "InstrumentOptions", "run_instruments"]

Row = dict[str, Any]
BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class InstrumentOptions:
    """Elements to compare; width, layers, rows and tokens of a training step; steps of the null; sides of matrices."""

    elements: int = 64_000_000
    width: int = 512
    layers: int = 6
    shapes: tuple[tuple[int, int], ...] = ((8, 64), (16, 128))
    null_steps: int = 1000
    matrices: tuple[tuple[int, int], ...] = ((4096, 1024), (2048, 2048))
    repeats: int = 5


def _seconds(work: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def _comparison(options: InstrumentOptions) -> Iterator[Row]:
    """Gigabytes of both states a second; each count is checked before it is timed."""
    generator = torch.Generator().manual_seed(0)
    count = options.elements
    old = (torch.randn(count, generator=generator) * 0.02).to(BF16)
    new = old.clone()
    moved = torch.randperm(count, generator=generator)[: count // 50]
    new.view(torch.int16)[moved] += 1
    a, b, target = old.view(torch.int16), new.view(torch.int16), torch.empty_like(old)
    if not (compare(old, new).changed == len(moved) == int((a != b).sum())):
        raise AssertionError("the counts differ")
    snapshot, states = FastSnapshot(old, None), [old, new]

    def renew() -> None:
        states.reverse()
        snapshot.renew(states[0])

    works: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: target.copy_(old), 4),
        "torch (a != b).sum()": (lambda: int((a != b).sum()), 4),
        "torch.equal, equal": (lambda: torch.equal(a, a.clone()), 4),
        "compare, 2 % changed": (lambda: compare(old, new), 4),
        "compare, nothing changed": (lambda: compare(old, old), 4),
        "fast snapshot, 2 % changed": (renew, 3),
    }
    for name, (work, size) in works.items():
        work()
        seconds = _seconds(work, options.repeats)
        yield {"part": "comparison", "what": name, "elements": count, "seconds": seconds,
               "gb_s": size * count / seconds / 1e9}  # fmt: skip


def _overhead(options: InstrumentOptions) -> Iterator[Row]:
    """Seconds of a tracker's step beside those of the training step that it follows."""
    for rows, length in options.shapes:
        for weights, dtype, view in (
            ("bf16", BF16, None),
            ("masters", torch.float32, BF16),
            ("fp32", torch.float32, None),
        ):
            model = tiny_llama(4096, hidden=options.width, layers=options.layers, positions=256, dtype=dtype).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
            size = sum(p.numel() for p in model.parameters())
            settings: dict[str, dict[str, Any]] = {
                "fast": {"mode": "fast"}, "fast, null": {"mode": "fast", "optimizer": optimizer, "null": True},
                "exact, lag 1": {"lags": (1,)}, "exact, lags 1, 8, 32": {},
            }  # fmt: skip
            trackers = {name: SparsityTracker(model, view=view, **more) for name, more in settings.items()}
            steps: list[float] = []
            spent: dict[str, list[float]] = {name: [] for name in trackers}
            for round_ in range(options.repeats + 2):
                began = time.perf_counter()
                tokens = torch.randint(4096, (rows, length + 1))
                logits = model(input_ids=tokens[:, :-1]).logits.float()
                optimizer.zero_grad()
                torch.autograd.backward(
                    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                )
                optimizer.step()
                steps.append(time.perf_counter() - began)
                changed = {}
                for name, tracker in trackers.items():
                    began = time.perf_counter()
                    changed[name] = tracker.step().changed
                    spent[name].append(time.perf_counter() - began)
                if round_ == 1:  # both have compiled what they need
                    steps.clear()
                    spent = {name: [] for name in trackers}
            step = median(steps)
            for name, tracker in trackers.items():
                yield {
                    "part": "overhead", "weights": weights, "tokens": rows * length, "parameters": size, "what": name,
                    "step_s": step, "share": median(spent[name]) / step, "bytes_per_parameter": tracker.nbytes / size,
                    "changed": changed[name], "changed_exactly": changed["exact, lag 1"],
                }  # fmt: skip


_RATES = {"adam": 1e-5, "adamw": 1e-5, "sgd": 3e-2, "adafactor": 1e-3}


def _optimizer(name: str, model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD,
             "adafactor": torch.optim.Adafactor}  # fmt: skip
    made: torch.optim.Optimizer = kinds[name](model.parameters(), lr=lr)
    return made


class _Training:
    """Supervised steps of the nano recipe's model, in bf16 or with fp32 masters that are seen as bf16."""

    def __init__(self, weights: str) -> None:
        self.recipe = nano_recipe()
        self.model = tiny_llama(13, hidden=64, layers=2, dtype=BF16 if weights == "bf16" else torch.float32)
        self.view = BF16 if weights == "masters" else None
        self._source = random.Random(0)

    def backward(self) -> None:
        self.model.zero_grad()
        learn_from_answers(self.recipe, self.model, [self.recipe.task.problem(self._source) for _ in range(32)])

    def seen(self) -> list[torch.Tensor]:
        return [p.detach().to(BF16).view(torch.int16) for p in self.model.parameters()]


def _null_first(_: InstrumentOptions) -> Iterator[Row]:
    """The closed form at the first step beside what real gradients change, with and without the gradients' sizes."""
    for weights in ("bf16", "masters"):
        for name, middle in _RATES.items():
            for factor in (0.1, 1.0, 10.0):
                training = _Training(weights)
                optimizer = _optimizer(name, training.model, middle * factor)
                training.backward()
                before = [cells.clone() for cells in training.seen()]
                rms = {n: float(p.grad.float().square().mean().sqrt()) for n, p in training.model.named_parameters()}
                plain = predict_null(training.model, optimizer=optimizer, view=training.view, gradient_rms=rms)
                sized = predict_null(
                    training.model, optimizer=optimizer, view=training.view, gradient_rms=gradient_sizes(training.model)
                )
                optimizer.step()
                pairs = list(zip(before, training.seen(), strict=True))
                observed = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
                yield {"part": "null, first step", "weights": weights, "what": name, "lr": middle * factor,
                       "observed": observed, "null": plain.fraction, "null_with_sizes": sized.fraction}  # fmt: skip


def _null_later(options: InstrumentOptions) -> Iterator[Row]:
    """A tracker's null beside what real training changes, over many steps; means of the last ten."""
    marks = [step for step in (10, 100, 300, options.null_steps) if step <= options.null_steps]
    for weights in ("bf16", "masters"):
        for name, lr in _RATES.items():
            training = _Training(weights)
            optimizer = _optimizer(name, training.model, lr)
            tracker = SparsityTracker(
                training.model, optimizer=optimizer, null=True, view=training.view, mode="fast", lags=(1,)
            )
            found: list[tuple[float, float]] = []
            for _ in range(options.null_steps):
                training.backward()
                optimizer.step()
                stats = tracker.step()
                found.append((stats.density, stats.null or 0.0))
            for mark in marks:
                last = found[max(0, mark - 10) : mark]
                observed, null = (sum(pair[side] for pair in last) / len(last) for side in (0, 1))
                yield {"part": "null, later steps", "weights": weights, "what": name, "lr": lr, "step": mark,
                       "observed": observed, "null": null}  # fmt: skip


def _matrices(rows: int, columns: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    side = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, side, generator=generator))[0] for n in (rows, columns))
    index = torch.arange(1, side + 1).float()
    for power in (0.5, 1.0, 1.5):
        yield f"power law {power}", (left * index**-power) @ right.T
    low = torch.randn(rows, 20, generator=generator) @ torch.randn(20, columns, generator=generator)
    yield "rank 20 with noise", 0.67 * low + 0.3 * torch.randn(rows, columns, generator=generator)


def _ranks(options: InstrumentOptions) -> Iterator[Row]:
    """Effective ranks beside those by the full SVD: seconds, and how far off."""
    for rows, columns in options.matrices:
        for name, matrix in _matrices(rows, columns):
            found: list[torch.Tensor] = []
            values_s = _seconds(lambda: found.append(torch.linalg.svdvals(matrix)), 1)  # noqa: B023
            vectors_s = _seconds(lambda: torch.linalg.svd(matrix, full_matrices=False), 1)  # noqa: B023
            values = found[0].double()
            full = Spectrum(values, torch.ones_like(values), float(values.square().sum()), len(values))
            for kind in KINDS:
                expected = rank_of(full, kind, tolerance=max(rows, columns) * 1.2e-7)
                result: list[float] = []
                seconds = _seconds(lambda: result.append(effective_rank(matrix, kind)), 2)  # noqa: B023
                yield {"part": "rank", "rows": rows, "columns": columns, "spectrum": name, "what": kind,
                       "full": expected, "found": result[0], "error": abs(result[0] / expected - 1),
                       "seconds": seconds, "svdvals_s": values_s, "svd_s": vectors_s}  # fmt: skip


PARTS: dict[str, tuple[Callable[[InstrumentOptions], Iterator[Row]], ...]] = {
    "compare": (_comparison,),
    "overhead": (_overhead,),
    "null": (_null_first, _null_later),
    "rank": (_ranks,),
}
"""What can be measured, by name."""


def run_instruments(
    parts: tuple[str, ...] = tuple(PARTS),
    options: InstrumentOptions | None = None,
    *,
    report: Callable[[str], None] | None = None,
) -> list[Row]:
    """Rows of the parts asked for, in their order.

    Raises:
        MisuseError: an unknown part.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise MisuseError(f"there is no part {', '.join(unknown)!r}; there are {', '.join(PARTS)}")
    options = options or InstrumentOptions()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    facts = {"bench": "instruments", "machine": machine(), "versions": versions()}
    rows: list[Row] = []
    try:
        for part in parts:
            for measure in PARTS[part]:
                for row in measure(options):
                    rows.append(row if rows else row | facts)  # the machine stands in the first row
                    if report is not None:
                        report(f"{row['part']}: {row['what']}")
    finally:
        torch.set_num_threads(threads)
    return rows

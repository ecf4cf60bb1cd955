"""Selecting the largest magnitudes: ours beside torch.topk and numpy.argpartition, and beside a plain pass over memory.

Peers are handed ``|x|`` for nothing. All are verified against a sort of everything before anything is timed, and take
turns within one round, so that a busy machine is busy for all. ``python -m thinwire.bench.selection`` runs where only
torch is installed, such as on a machine borrowed for its GPU (there, with Triton); it prints rows of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from thinwire.bench.measure import load, machine, seconds, versions, write_rows
from thinwire.errors import MisuseError
from thinwire.tensors import select_oracle
from thinwire.tensors.select import accumulate_top_k, fill_sparse_, top_k

__all__ = ["DISTRIBUTIONS", "SelectionOptions", "run_selection"]

Row = dict[str, Any]
OURS = ("top_k", "top_k, hint", "accumulate_top_k", "fill_sparse_")
"""Each is compared with ``PEER`` of it."""
PEER = {
    "top_k": "torch.topk",
    "top_k, hint": "torch.topk",
    "accumulate_top_k": "torch.add, torch.topk",
    "fill_sparse_": "zero_, index_put_",
}
_RUN = 1 << 16  # elements of one scale in "layers"


def _heavy(numel: int, random: torch.Generator, device: str) -> torch.Tensor:
    """Student's t with 2 degrees of freedom."""
    normal = torch.randn(numel, generator=random, device=device)
    return normal.div_(torch.empty_like(normal).exponential_(generator=random).sqrt_())


def _layers(numel: int, random: torch.Generator, device: str) -> torch.Tensor:
    """Heavy-tailed, of a scale that varies from run to run as it does between layers."""
    scales = torch.randn(-(-numel // _RUN), generator=random, device=device).mul_(2).exp_()
    return _heavy(numel, random, device).mul_(scales.repeat_interleave(_RUN)[:numel])


DISTRIBUTIONS: Mapping[str, Callable[[int, torch.Generator, str], torch.Tensor]] = {
    "normal": lambda numel, random, device: torch.randn(numel, generator=random, device=device),
    "heavy": _heavy,
    "layers": _layers,
}


@dataclass(frozen=True, slots=True)
class SelectionOptions:
    """What is measured. ``threads`` matter on the CPU only."""

    device: str = "cpu"
    numels: tuple[int, ...] = (25_000_000,)
    densities: tuple[float, ...] = (0.01, 0.001)
    distributions: tuple[str, ...] = tuple(DISTRIBUTIONS)
    threads: tuple[int, ...] = (1, 2)
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not set(self.distributions) <= set(DISTRIBUTIONS):
            raise MisuseError(f"distributions must be of {', '.join(DISTRIBUTIONS)}, not {self.distributions}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise MisuseError("no CUDA device at hand; measure on the CPU")
        if not all(0 < d < 1 for d in self.densities) or self.repeats < 1 or min(self.threads, default=0) < 1:
            raise MisuseError("densities lie between 0 and 1; repeats and threads are at least 1")


@dataclass(frozen=True, slots=True)
class _Case:
    """One thing to time; ``prepare`` puts back before each run what the run changes."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def _read(bits: np.ndarray[Any, np.dtype[np.uint32]], threads: int) -> object:
    """The least that any exact selection must do: look at every element once."""
    parts = np.array_split(bits, threads)
    if threads == 1:
        return np.bitwise_xor.reduce(bits)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(np.bitwise_xor.reduce, parts))


def _torch_accumulate(gradient: torch.Tensor, residual: torch.Tensor, out: torch.Tensor, k: int) -> torch.Tensor:
    torch.add(residual, gradient, out=out)
    return torch.topk(out.abs(), k, sorted=False).indices


def _cases(x: torch.Tensor, k: int, random: torch.Generator, threads: int) -> dict[str, _Case]:
    magnitude, residual, out = x.abs(), torch.randn(x.numel(), generator=random, device=x.device), torch.empty_like(x)
    found = top_k(x, k, threads=threads)
    hint = 1.02 * found.threshold  # as if it had fallen since the last step
    total = top_k(x + residual, k, threads=threads)
    kept = x[found.indices.long()]
    positions = found.indices.long()
    cases = {
        "torch.topk": _Case(lambda: torch.topk(magnitude, k, sorted=False)),
        "top_k": _Case(lambda: top_k(x, k, threads=threads)),
        "top_k, hint": _Case(lambda: top_k(x, k, hint=hint, threads=threads)),
        "torch.add, torch.topk": _Case(lambda: _torch_accumulate(x, residual, out, k)),
        "accumulate_top_k": _Case(lambda: accumulate_top_k(x, residual, k, out=out, threads=threads)),
        "accumulate_top_k, hint": _Case(
            lambda: accumulate_top_k(x, residual, k, hint=1.02 * total.threshold, out=out, threads=threads)
        ),
        "zero_, index_put_": _Case(lambda: out.zero_().index_put_((positions,), kept)),
        "fill_sparse_": _Case(lambda: fill_sparse_(out, found.indices, kept, threads=threads)),
    }
    if x.device.type == "cpu":
        bits, plain = x.numpy().view(np.uint32), magnitude.numpy()
        cases["read"] = _Case(lambda: _read(bits, threads))
        cases["copy"] = _Case(lambda: out.copy_(x))
        if threads == 1:
            cases["numpy.argpartition"] = _Case(lambda: np.argpartition(plain, plain.size - k))
    else:
        cases["copy"] = _Case(lambda: out.copy_(x))
    return cases


def _verify(x: torch.Tensor, k: int, threads: int) -> bool:
    """Ours equal the sort of everything; torch.topk has the same magnitudes, and other indices only among equals."""
    keys = select_oracle.keys(x)
    want = select_oracle.top_k(x, k)
    found = top_k(x, k, threads=threads)
    exact = torch.equal(found.indices, want) and found.finite
    for wrong in (1.02, 0.5, 2.0):
        exact &= torch.equal(top_k(x, k, hint=wrong * found.threshold, threads=threads).indices, want)
    theirs = torch.topk(x.abs(), k, sorted=False).indices
    exact &= torch.equal(keys[theirs].sort().values, keys[want.long()].sort().values)
    residual, out = x.flip(0), torch.empty_like(x)
    total = accumulate_top_k(x, residual, k, gradient_scale=0.3, residual_scale=0.7, out=out, threads=threads)
    exact &= torch.equal(out, select_oracle.accumulate(x, residual, 0.3, 0.7))
    exact &= torch.equal(total.indices, select_oracle.top_k(out, k))
    fill_sparse_(out, want, x[want.long()], threads=threads)
    residual.zero_()[want.long()] = x[want.long()]
    return exact and torch.equal(out, residual)


def _timed(case: _Case, device: str) -> float:
    case.prepare()
    if device != "cuda":
        return seconds(case.run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    case.run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _about(device: str) -> Row:
    facts: Row = {"machine": machine(), "versions": versions()}
    if device == "cuda":
        facts["machine"]["gpu"] = torch.cuda.get_device_name()
        facts["versions"]["torch"] = torch.__version__
        facts["versions"]["cuda"] = torch.version.cuda
        facts["versions"]["triton"] = metadata.version("triton") if find_spec("triton") else None
    return facts


def _measure(x: torch.Tensor, k: int, random: torch.Generator, threads: int, options: SelectionOptions) -> Row:
    with _torch_threads(threads):
        if not _verify(x, k, threads):
            raise AssertionError("a selection differs from the sort of everything; do not trust this build")
        cases, before = _cases(x, k, random, threads), load()
        runs: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(options.repeats + 1):
            for name, case in cases.items():
                took = _timed(case, options.device)
                if turn:  # the first one warms up
                    runs[name].append(took)
    best = {name: min(took) for name, took in runs.items()}
    middle = {name: median(took) for name, took in runs.items()}
    size = x.numel() * x.element_size()
    return {
        "numel": x.numel(),
        "k": k,
        "threads": threads,
        "best_s": {name: round(took, 7) for name, took in best.items()},
        "median_s": {name: round(took, 7) for name, took in middle.items()},
        "times_faster": {name: round(best[PEER[name]] / best[name], 2) for name in OURS},
        "times_faster_median": {name: round(middle[PEER[name]] / middle[name], 2) for name in OURS},
        "gb_s": round(size / best["top_k"] / 1e9, 1),
        "copy_gb_s": round(2 * size / best["copy"] / 1e9, 1),
        "read_gb_s": round(size / best["read"] / 1e9, 1) if "read" in best else None,
        "runs": options.repeats,
        "verified": True,
        "load_before": before,
        "load_after": load(),
    }


def run_selection(options: SelectionOptions, *, report: Callable[[str], object] = lambda _: None) -> list[Row]:
    """One row for each distribution, size, density and number of threads."""
    rows, device = [], options.device
    for distribution in options.distributions:
        for numel in options.numels:
            random = torch.Generator(device).manual_seed(options.seed)
            x = DISTRIBUTIONS[distribution](numel, random, device)
            for density in options.densities:
                for threads in options.threads if device == "cpu" else (1,):
                    report(f"{distribution}, {numel:,} elements, {density:.2%}, {threads} threads")
                    k = max(1, round(density * numel))
                    what = {"bench": "selection", "device": device, "distribution": distribution, "density": density}
                    rows.append(what | _measure(x, k, random, threads, options) | _about(device))
    return rows


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m thinwire.bench.selection", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--numel", type=int, nargs="+", help="elements; 25.6 and 100 million on CUDA")
    parser.add_argument("--density", type=float, nargs="+", default=[0.01, 0.001])
    parser.add_argument("--distribution", choices=tuple(DISTRIBUTIONS), nargs="+", default=list(DISTRIBUTIONS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--out", type=Path, help="write the rows to this file")
    parser.add_argument("--json", action="store_true", help="rows are always of JSON; taken for likeness")
    given = parser.parse_args()
    on_device = given.device == "cuda"
    options = SelectionOptions(
        device=given.device,
        numels=tuple(given.numel or ((25_600_000, 100_000_000) if on_device else (25_000_000,))),
        densities=tuple(given.density),
        distributions=tuple(given.distribution),
        threads=tuple(given.threads),
        repeats=given.repeats or (30 if on_device else 5),
    )
    rows = run_selection(options)
    if given.out is not None:
        write_rows(given.out, rows)
    for row in rows:
        print(json.dumps(row, sort_keys=True))


if __name__ == "__main__":
    _main()

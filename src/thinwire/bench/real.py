"""A real trainer's versions, published and followed; every step's bytes beside what others would have sent.

Whatever yields bf16 states can be measured: :func:`thinwire.lab.real.smollm2_grpo_versions` trains a language model.
Every version is published at two levels into two stores, followed by a consumer each, and compared bit for bit with
the trainer's weights; the peers encode the same pairs and are verified alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinwire.bench.codec import NotLosslessError
from thinwire.bench.entropy import entropy_of
from thinwire.bench.measure import load, machine, versions
from thinwire.bench.peers import PEERS, Peer, apply_all, encode_all, units_of
from thinwire.bench.weights import Cells, Pair
from thinwire.errors import MisuseError
from thinwire.sync.consumer import ApplyResult, Consumer
from thinwire.sync.encode import thread_count
from thinwire.sync.publisher import Publisher, PublishReport
from thinwire.tensors.bits import cells_of
from thinwire.wire.values import steps

__all__ = ["LEVELS", "run_real", "summary"]

LEVELS = ("small", "smallest")
_PEERS = tuple(peer for peer in PEERS if peer.name not in ("copy", "zstd-1"))

Row = dict[str, Any]
Report = Callable[[str], None]


@dataclass(slots=True)
class _Lane:
    """One level: its publisher, its store, and a model that follows it."""

    level: str
    publisher: Publisher
    consumer: Consumer
    model: dict[str, torch.Tensor]
    loaded: bool = False
    published: list[PublishReport] = field(default_factory=list)

    def publish(self, state: Mapping[str, torch.Tensor], step: int) -> PublishReport:
        report = self.publisher.publish(state, step=step)
        self.published.append(report)
        return report

    def follow(self) -> ApplyResult:
        if not self.loaded:
            self.loaded = True
            return self.consumer.load(self.model)
        version = self.consumer.poll()
        if version is None:
            raise NotLosslessError(f"the version just published at level {self.level} is not in its store")
        return version.apply(self.model)


def _flat(state: Mapping[str, torch.Tensor]) -> Cells:
    return np.concatenate([cells_of(tensor) for _, tensor in sorted(state.items())])


def _lane(level: str, folder: Path, state: Mapping[str, torch.Tensor]) -> _Lane:
    store = str(folder / level)
    model = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return _Lane(level, Publisher(store, level=level), Consumer(store), model)


def _thinwire_step(lane: _Lane, state: Mapping[str, torch.Tensor], flat: Cells, step: int) -> Row:
    """Publish, follow, compare all bits."""
    published = lane.publish(state, step)
    applied = lane.follow()
    exact = applied.digest == published.digest and np.array_equal(_flat(lane.model), flat)
    return {
        "bytes": published.patch_bytes,
        "bytes_per_changed": _each(published.patch_bytes, published.changed),
        "total_bytes": published.total_bytes,
        "exact": exact,
        "path": applied.path,
        "publish_s": {k: round(v, 4) for k, v in published.seconds.items()},
        "apply_s": {k: round(v, 4) for k, v in applied.seconds.items()},
    }


def _each(size: int, changed: int) -> float | None:
    return round(size / changed, 4) if changed else None


def _peer_step(peer: Peer, pair: Pair, target: Cells, changed: int, pool: ThreadPoolExecutor) -> Row:
    began = time.perf_counter()
    data = encode_all(peer, units_of(peer, pair.old, pair.shapes), units_of(peer, pair.new, pair.shapes), pool)
    encoded = time.perf_counter()
    target[:] = pair.old
    started = time.perf_counter()
    apply_all(peer, data, units_of(peer, target, pair.shapes), pool)
    ended = time.perf_counter()
    if not np.array_equal(target, pair.new):
        raise NotLosslessError(f"{peer.name} does not give the new weights back")
    size = sum(map(len, data))
    return {
        "bytes": size,
        "bytes_per_changed": _each(size, changed),
        "encode_s": round(encoded - began, 4),
        "apply_s": round(ended - started, 4),
    }


def _change_statistics(pair: Pair) -> Row:
    """How far the changed weights moved, in units in the last place, and how the changes lie among the exponents."""
    where = np.flatnonzero(pair.old != pair.new)
    codes = steps(pair.old[where], pair.new[where], is_float=True).astype(np.int64)
    moved = (codes + 1) >> 1
    exponents = (pair.old[where] & 0x7FFF) >> 7
    everything = np.bincount((pair.old & 0x7FFF) >> 7, minlength=256)
    changed = np.bincount(exponents, minlength=256)
    present = np.flatnonzero(everything)
    return {
        "ulp_median": float(np.median(moved)) if where.size else None,
        "ulp_one_share": round(float(np.mean(moved == 1)), 4) if where.size else None,
        "ulp_max": int(moved.max()) if where.size else None,
        "by_exponent": [[int(e), int(everything[e]), int(changed[e])] for e in present],
    }


def run_real(
    states: Iterator[dict[str, torch.Tensor]], folder: Path, *, source: str, report: Report = lambda _: None
) -> list[Row]:
    """Publish and follow each state; a row for every one but the first, which is an anchor.

    ``source`` says where the states come from. ``folder`` takes the two stores.

    Raises:
        NotLosslessError: a peer lost something. A version of thinwire that is not exact is reported in its row.
    """
    began = time.perf_counter()
    first = dict(sorted(next(states).items()))
    if any(tensor.dtype != torch.bfloat16 for tensor in first.values()):
        raise MisuseError("the versions must be bf16 throughout")
    shapes = {name: tuple(tensor.shape) for name, tensor in first.items()}
    lanes = [_lane(level, folder, first) for level in LEVELS]
    old = _flat(first)
    target, rows = np.empty_like(old), []
    for lane in lanes:
        found = _thinwire_step(lane, first, old, 0)
        report(f"step 0 at {lane.level}: anchor of {found['total_bytes']:,} bytes, exact {found['exact']}")
    common = {"bench": "real", "source": source, "machine": machine(), "versions": versions()}
    with ThreadPoolExecutor(thread_count(0)) as pool:
        trained = time.perf_counter()
        for step, state in enumerate(states, start=1):
            made = time.perf_counter()
            new = _flat(state)
            pair = Pair("real", shapes, old, new)
            entropy = entropy_of(old, new)
            row: Row = {
                **common,
                "step": step,
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "load": load(),
                "state_bytes": new.nbytes,
                "elements": new.size,
                "changed": entropy.changed,
                "density": entropy.changed / new.size,
                "entropy": {"plain": round(entropy.plain, 4), "exponent": round(entropy.exponent, 4)},
                "trainer_s": round(made - trained, 3),
                "changes": _change_statistics(pair),
                "thinwire": {lane.level: _thinwire_step(lane, state, new, step) for lane in lanes},
                "peers": {p.name: _peer_step(p, pair, target, entropy.changed, pool) for p in _PEERS},
            }
            rows.append(row)
            report(_line(row))
            old = new
            trained = time.perf_counter()
    for lane in lanes:
        lane.publisher.close()
    report(f"{time.perf_counter() - began:.0f} s in all")
    return rows


def _line(row: Row) -> str:
    sizes = ", ".join(f"{level} {found['bytes_per_changed']}" for level, found in row["thinwire"].items())
    return f"step {row['step']}: {100 * row['density']:.3f} % changed; bytes per changed element: {sizes}"


def summary(rows: Sequence[Row]) -> Row:
    """Bytes per changed element of each codec (least, mean, most over the steps), and whether all was exact."""
    found: dict[str, list[float]] = {}
    for row in rows:
        codecs = {f"thinwire {k}": v for k, v in row["thinwire"].items()} | row["peers"]
        for name, value in codecs.items():
            if value["bytes_per_changed"] is not None:
                found.setdefault(name, []).append(value["bytes_per_changed"])
    full = sum(row["state_bytes"] for row in rows)
    sent = {level: sum(row["thinwire"][level]["total_bytes"] for row in rows) for level in LEVELS}
    return {
        "steps": len(rows),
        "exact": all(found["exact"] for row in rows for found in row["thinwire"].values()),
        "density": [min(row["density"] for row in rows), max(row["density"] for row in rows)],
        "bytes_per_changed": {k: [min(v), round(sum(v) / len(v), 4), max(v)] for k, v in found.items()},
        "share_of_full_checkpoints": {level: round(size / full, 6) for level, size in sent.items()},
    }

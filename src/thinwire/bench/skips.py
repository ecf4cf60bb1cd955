"""Catching up by skip deltas, by replay and by anchors: bytes on a real chain, followed bit for bit, then simulated.

A chain of versions is published and compacted. For every number of versions that a consumer may be behind, and every
place in the chain, the planner says what it would fetch; some of these ways are gone for real, counting every byte
read, manifests and records included, and compared by digest. The sizes of the measured skip deltas give a power law, by
which chains of any length are planned by the same code: those rows are marked as simulated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from thinwire.bench.measure import machine, versions
from thinwire.chain.plan import plan, sketch
from thinwire.errors import MisuseError
from thinwire.stores.memory import MemoryStore
from thinwire.stores.protocol import ObjectInfo
from thinwire.sync.collector import all_manifests
from thinwire.sync.compactor import LADDERS, compact, ladder
from thinwire.sync.consumer import Consumer
from thinwire.sync.publisher import Publisher
from thinwire.sync.remote import Remote
from thinwire.wire.skip import Skip

__all__ = ["fit", "run_skips", "simulate"]

Row = dict[str, Any]
State = dict[str, torch.Tensor]
Report = Callable[[str], None]
_PLACES = 12  # simulated places in the chain for each number of versions behind
_LISTED_BYTES = 300  # what S3 sends for one key of a listing, about


class _Counting:
    """A store whose reads are counted, for one consumer."""

    def __init__(self, store: MemoryStore) -> None:
        self._store, self._lock = store, threading.Lock()
        self.bytes = self.requests = self.listed = 0

    def get(self, key: str, *, size_max: int) -> bytes:
        data = self._store.get(key, size_max=size_max)
        with self._lock:
            self.bytes, self.requests = self.bytes + len(data), self.requests + 1
        return data

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        self.requests += 1
        for info in self._store.list(prefix, start_after=start_after):
            self.listed += 1
            yield info


def run_skips(states: Iterable[State], *, source: str, report: Report = lambda _: None) -> list[Row]:
    """Rows of kinds ``rung`` (sizes by span), ``behind`` (bytes by versions behind) and ``followed`` (gone for real).

    Raises:
        MisuseError: fewer than four states.
    """
    store = MemoryStore()
    digests: dict[int, str] = {}
    with Publisher(store, threads=1, anchor_ratio=1e9) as publisher:  # the first version is the only anchor
        for state in states:
            made = publisher.publish(state)
            digests[made.version] = made.digest
            report(f"version {made.version}: {made.density:.2%} changed")
            first = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    if len(digests) < 4:
        raise MisuseError("skip deltas need at least four versions")
    return [row for kind in LADDERS for row in _of_kind(kind, store, first, digests, source, report)]


def _of_kind(
    kind: str, store: MemoryStore, model: State, digests: dict[int, str], source: str, report: Report
) -> list[Row]:
    """Rows of one kind of ladder; that of the next kind is written to the same store afterwards."""
    report(f"compacting: {kind}")
    compact(store, kind=kind, threads=1)
    remote = Remote(store, retry_s=0)
    manifests = all_manifests(remote)
    newest = max(manifests)
    wanted = {(base, v) for v in manifests for base in ladder(v, kind)}
    pairs = [pair for pair in remote.skip_hints(1, newest) if pair in wanted]
    skips = [skip for pair in pairs if (skip := remote.skip(*pair)) is not None]
    common = {
        "bench": "skips", "source": source, "ladder": kind, "versions_published": newest, "simulated": False,
        "state_bytes": manifests[1].facts["state_bytes"], "machine": machine(), "versions": versions(),
    }  # fmt: skip
    singles = {v: manifests[v].deltas[0].object.size for v in range(2, newest + 1)}
    rows = [{**common, "kind": "rung", **row} for row in _rungs(singles, skips, manifests[2].facts["elements"])]
    report(f"planning: {kind}")
    behind = [{**common, "kind": "behind", **row} for row in _behind(_ways(manifests, skips, singles))]
    places = {row["behind"]: row["worst_place"] for row in behind if row["behind"] in (2, 8, 32)}
    for gap, worst in places.items():
        for have in sorted({worst, worst - worst % gap or gap}):
            if have + gap <= newest:
                report(f"following from {have} to {have + gap}")
                rows.append({**common, "kind": "followed", **_followed(store, model, have, have + gap, digests)})
    return rows + behind


def _rungs(singles: dict[int, int], skips: list[Skip], elements: int) -> Iterator[Row]:
    by_span: dict[int, list[int]] = {1: list(singles.values())}
    changed: dict[int, list[int]] = {}
    for skip in skips:
        by_span.setdefault(skip.version - skip.base, []).append(skip.object.size)
        changed.setdefault(skip.version - skip.base, []).append(skip.changed)
    for span, sizes in sorted(by_span.items()):
        density = mean(changed[span]) / elements if span in changed else None
        yield {
            "span": span, "count": len(sizes), "bytes_mean": round(mean(sizes)), "bytes_total": sum(sizes),
            "density": density,
        }  # fmt: skip


def _ways(manifests: Any, skips: list[Skip], singles: dict[int, int]) -> dict[tuple[int, int], tuple[int, int, int]]:
    """(from, to) to bytes and hops over the ladder, and bytes of the replay; an anchor would be one fetch more."""
    found = {}
    for have in range(1, max(manifests)):
        for target in range(have + 1, max(manifests) + 1):
            known = {v: manifests[v] for v in range(have, target + 1)}
            inside = [skip for skip in skips if have <= skip.base and skip.version <= target]
            path = plan(known, target, have=have, have_state=manifests[have].state, skips=inside)
            replay = sum(singles[v] for v in range(have + 1, target + 1))
            found[have, target] = path.size, len(path.hops), replay
    return found


def _behind(ways: dict[tuple[int, int], tuple[int, int, int]]) -> Iterator[Row]:
    newest = max(target for _, target in ways)
    for gap in range(1, newest):
        at = {have: ways[have, have + gap] for have in range(1, newest - gap + 1)}
        shares = {have: size / replay for have, (size, _, replay) in at.items()}
        worst = max(shares, key=lambda have: shares[have])
        yield {
            "behind": gap, "places": len(at), "replay_bytes": round(mean(replay for _, _, replay in at.values())),
            "ladder_bytes": round(mean(size for size, _, _ in at.values())),
            "share_best": min(shares.values()), "share_median": median(shares.values()),
            "share_mean": mean(shares.values()), "share_worst": shares[worst], "worst_place": worst,
            "hops_mean": mean(hops for _, hops, _ in at.values()), "hops_max": max(hops for _, hops, _ in at.values()),
        }  # fmt: skip


def _followed(store: MemoryStore, model: State, have: int, target: int, digests: dict[int, str]) -> Row:
    """Go from ``have`` to ``target``, with skip deltas and in every single step; every byte that was read counts."""
    found: Row = {"have": have, "target": target}
    for name in ("ladder", "replay"):
        counting = _Counting(store)
        consumer = Consumer(counting, retry_s=0, threads=1)
        consumer.load(model, version=have)
        before = counting.bytes, counting.requests, counting.listed
        patches = hops = 0
        for version in [target] if name == "ladder" else range(have + 1, target + 1):
            result = consumer._apply(consumer._manifest(version), None, model, None)
            patches, hops = patches + result.bytes_fetched, hops + result.hops
        if result.digest != digests[target]:
            raise AssertionError(f"version {target} is {result.digest}, it was published as {digests[target]}")
        read, requests, listed = counting.bytes - before[0], counting.requests - before[1], counting.listed - before[2]
        found |= {
            f"{name}_patch_bytes": patches, f"{name}_hops": hops, f"{name}_requests": requests,
            f"{name}_all_bytes": read + _LISTED_BYTES * listed,
        }  # fmt: skip
    return {**found, "digest_equal": True}


# --- longer chains, simulated --------------------------------------------------------------------------------------


def fit(rows: Iterable[Row]) -> Row:
    """A power law ``bytes = first * span ** exponent`` through the measured mean sizes by span.

    The largest span is held out, and its error is part of the row.
    """
    points = sorted(
        (row["span"], row["bytes_mean"]) for row in rows if row["kind"] == "rung" and row["ladder"] == "ladder"
    )
    if len(points) < 3:
        raise MisuseError("a power law needs skip deltas of two spans at least, beside the one held out")
    spans, sizes = np.log(np.array(points, np.float64)).T
    exponent, first = np.polyfit(spans[:-1], sizes[:-1], 1)
    span, size = points[-1]
    predicted = float(np.exp(first) * span**exponent)
    return {
        "bench": "skips", "kind": "model", "simulated": True, "first_bytes": float(np.exp(first)),
        "exponent": float(exponent), "held_out_span": span, "held_out_error": predicted / size - 1,
    }  # fmt: skip


def simulate(rows: list[Row], newest: int = 10_000) -> list[Row]:
    """What being 1 to ``newest - 1`` versions behind costs, by the power law of ``rows`` and the real planner.

    No skip delta is larger than the state. Rows of kind ``model`` and ``simulated``.
    """
    law, state = fit(rows), next(row["state_bytes"] for row in rows if row["kind"] == "rung")

    def size(span: int) -> int:
        return int(min(law["first_bytes"] * span ** law["exponent"], state))

    hints = {(base, v): size(v - base) for v in range(2, newest + 1) for base in ladder(v)}
    random = np.random.default_rng(0)
    found = [law]
    gaps = sorted({round(float(gap)) for gap in np.geomspace(1, newest - 1, 28)})
    for gap in gaps:
        totals, hops = [], []
        for have in random.integers(1, newest - gap + 1, _PLACES).tolist():
            inside = {pair: hint for pair, hint in hints.items() if have <= pair[0] and pair[1] <= have + gap}
            way = sketch(inside, have + gap, starts={have: 0}, single_bytes=size(1))
            totals.append(sum(inside.get(pair, size(1)) for pair in pairwise(way)))
            hops.append(len(way) - 1)
        found.append(
            {
                "bench": "skips", "kind": "simulated", "simulated": True, "behind": gap, "state_bytes": state,
                "replay_bytes": gap * size(1), "ladder_bytes": round(mean(totals)), "ladder_bytes_max": max(totals),
                "hops_mean": mean(hops), "hops_max": max(hops),
            }
        )  # fmt: skip
    return found

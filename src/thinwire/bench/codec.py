"""thinwire's levels against what others send: size, speed and memory, side by side in one process.

Every codec is verified before it is timed: from the old weights and its bytes alone the new weights must come out, bit
for bit. The runs are interleaved, round by round, so that a disturbance of the machine meets all codecs alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from thinwire.bench.endtoend import end_to_end
from thinwire.bench.entropy import entropy_of
from thinwire.bench.measure import GIB, Stopwatch, extra_memory, load, machine, seconds, versions
from thinwire.bench.peers import PATCH_FROM, PEERS, Peer, apply_all, encode_all, units_of
from thinwire.bench.stages import stage_costs
from thinwire.bench.weights import Cells, Pair, layouts_of, parts_of
from thinwire.sync.apply import apply_patch, tree_of
from thinwire.sync.encode import Options, Snapshot, make_patch, thread_count
from thinwire.sync.layout import MemorySource
from thinwire.wire.patch import Patch

__all__ = ["THINWIRE", "NotLosslessError", "run_codecs"]

THINWIRE = (("fast", "ulp"), ("small", "ulp"), ("small", "absolute"), ("smallest", "ulp"))
_SAMPLE = 64 << 20  # bytes of state for what is too slow to see all of it

Report = Callable[[str], None]


class NotLosslessError(AssertionError):
    """A codec did not give the new weights back: a bug in it, and no figure of it means anything."""


class Codec(Protocol):
    """What is measured. ``before_*`` restore the old version and are not timed."""

    name: str
    note: str
    digest: bool

    def before_encode(self) -> None: ...
    def encode(self) -> Sequence[bytes]: ...
    def before_apply(self) -> None: ...
    def apply(self, data: Sequence[bytes]) -> None: ...


@dataclass(slots=True)
class _Arena:
    """Memory that the codecs share: a snapshot for thinwire's encoder, and the weights that are brought forward."""

    pair: Pair
    threads: int
    pool: ThreadPoolExecutor
    target: Cells
    snapshot: Cells


class _Thinwire:
    """One level of thinwire: state to patch file and back, digests of every block included both ways."""

    digest = True

    def __init__(self, arena: _Arena, level: str, values: str) -> None:
        self.name = f"thinwire {level}" if values == "ulp" else f"thinwire {level}, {values}"
        self.note = {"ulp": "steps", "absolute": "new values; applying twice does no harm"}[values]
        self._arena, self._options = arena, Options(level, values, arena.threads)
        pair = arena.pair
        self._layouts = layouts_of(pair.shapes)
        self._old = tree_of(self._layouts, parts_of(pair.old, pair.shapes), {})
        self._leaves = _leaves(pair)
        self._source = MemorySource(self._layouts, parts_of(pair.new, pair.shapes))
        self._cells = parts_of(arena.target, pair.shapes)
        self._snapshot: Snapshot | None = None

    def before_encode(self) -> None:
        self._arena.snapshot[:] = self._arena.pair.old
        cells = parts_of(self._arena.snapshot, self._arena.pair.shapes)
        leaves = {name: list(found) for name, found in self._leaves.items()}
        self._snapshot = Snapshot(dict(self._layouts), cells, leaves, self._old)

    def encode(self) -> list[bytes]:
        assert self._snapshot is not None
        return [b"".join(make_patch(self._snapshot, self._source, self._options).encode())]

    def before_apply(self) -> None:
        self._arena.target[:] = self._arena.pair.old

    def apply(self, data: Sequence[bytes]) -> None:
        cells = dict(self._cells)
        apply_patch(Patch.parse(data[0]), dict(self._layouts), cells, threads=self._arena.threads)


def _leaves(pair: Pair) -> dict[str, list[bytes]]:
    """Digests of the blocks of the old version."""
    from thinwire.sync.encode import take_snapshot

    layouts = layouts_of(pair.shapes)
    return take_snapshot(MemorySource(layouts, parts_of(pair.old, pair.shapes))).leaves


@dataclass(slots=True)
class _Other:
    """A peer over the same memory."""

    arena: _Arena
    peer: Peer
    digest: bool = False
    name: str = field(init=False)
    note: str = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.note = self.peer.name, self.peer.note

    def _units(self, flat: Cells) -> list[Cells]:
        return units_of(self.peer, flat, self.arena.pair.shapes)

    def before_encode(self) -> None:
        return

    def encode(self) -> list[bytes]:
        return encode_all(
            self.peer, self._units(self.arena.pair.old), self._units(self.arena.pair.new), self.arena.pool
        )

    def before_apply(self) -> None:
        self.arena.target[:] = self.arena.pair.old

    def apply(self, data: Sequence[bytes]) -> None:
        apply_all(self.peer, data, self._units(self.arena.target), self.arena.pool)


def _verify(codec: Codec, arena: _Arena) -> int:
    """Bytes of the encoding, once it is shown to be lossless; this also compiles all that will be timed."""
    codec.before_encode()
    data = codec.encode()
    codec.before_apply()
    codec.apply(data)
    if not np.array_equal(arena.target, arena.pair.new):
        raise NotLosslessError(f"{codec.name} does not give the new weights back")
    return sum(map(len, data))


def _round(codec: Codec, times: Mapping[str, Stopwatch]) -> None:
    codec.before_encode()
    with times["encode"]():
        data = codec.encode()
    codec.before_apply()
    with times["apply"]():
        codec.apply(data)


def _memory(codec: Codec) -> dict[str, int | None]:
    codec.before_encode()
    kept: list[Sequence[bytes]] = []
    encode = extra_memory(lambda: kept.append(codec.encode()))
    codec.before_apply()
    return {"encode": encode, "apply": extra_memory(lambda: codec.apply(kept[0]))}


def _sample(pair: Pair) -> Pair:
    """The first part of a state, as one tensor."""
    cells = min(_SAMPLE // 2, pair.new.size)
    return replace(pair, shapes={"sample": (cells,)}, old=pair.old[:cells], new=pair.new[:cells])


def _arena(pair: Pair, threads: int, pool: ThreadPoolExecutor) -> _Arena:
    return _Arena(pair, threads, pool, np.zeros_like(pair.old), np.zeros_like(pair.old))


def _row(
    codec: Codec, arena: _Arena, size: int, times: Mapping[str, Stopwatch], memory: dict[str, int | None]
) -> dict[str, Any]:
    pair = arena.pair
    changed = int(np.count_nonzero(pair.old != pair.new))
    row: dict[str, Any] = {
        "bench": "codec",
        "codec": codec.name,
        "note": codec.note,
        "computes_digest": codec.digest,
        "verified": True,
        "state_bytes": pair.size,
        "tensors": len(pair.shapes),
        "changed": changed,
        "density": changed / pair.new.size,
        "patch_bytes": size,
        "bytes_per_changed": round(size / max(changed, 1), 4),
        "encode": times["encode"].timing().row(pair.size),
        "apply": times["apply"].timing().row(pair.size),
    }
    for stage, extra in memory.items():
        row[stage]["extra_memory_percent"] = None if extra is None else round(100 * extra / pair.size, 2)
    return row


def _measure(codecs: Sequence[Codec], arena: _Arena, repeats: int, report: Report) -> list[dict[str, Any]]:
    sizes = {}
    for codec in codecs:
        sizes[codec.name] = _verify(codec, arena)
        report(f"{codec.name}: lossless, {sizes[codec.name]:,} bytes")
    times = {codec.name: {"encode": Stopwatch(), "apply": Stopwatch()} for codec in codecs}
    for k in range(repeats):
        for codec in codecs:
            _round(codec, times[codec.name])
        report(f"round {k + 1} of {repeats}")
    return [_row(c, arena, sizes[c.name], times[c.name], _memory(c)) for c in codecs]


def _base_costs(arena: _Arena, repeats: int) -> dict[str, float]:
    """Seconds of a plain copy of the state and of its digest, on the same threads, at best."""
    layouts, parts = layouts_of(arena.pair.shapes), parts_of(arena.pair.new, arena.pair.shapes)
    cuts = [slice(at, at + (1 << 22)) for at in range(0, arena.target.size, 1 << 22)]

    def copy() -> None:
        list(arena.pool.map(lambda cut: np.copyto(arena.target[cut], arena.pair.new[cut]), cuts))

    copies = [seconds(copy) for _ in range(repeats + 1)]
    digests = [seconds(lambda: tree_of(layouts, parts, {}, threads=arena.threads)) for _ in range(repeats + 1)]
    return {"copy_s": round(min(copies[1:]), 6), "digest_s": round(min(digests[1:]), 6)}


def _finish(row: dict[str, Any], base: dict[str, float]) -> None:
    """Add what relates a row to the copy and the digest of the same run."""
    for stage in ("encode", "apply"):
        best = row[stage]["best_s"]
        with_digest = best if row["computes_digest"] else best + base["digest_s"]
        row[stage]["best_gib_s_with_digest"] = round(row["state_bytes"] / GIB / with_digest, 6)
        row[stage]["copies"] = round(best / base["copy_s"], 2)


def run_codecs(
    pair: Pair, *, repeats: int = 5, threads: int = 0, peers: bool = True, report: Report = lambda _: None
) -> list[dict[str, Any]]:
    """Measure all codecs on one pair; a row each.

    A peer's ``best_gib_s_with_digest`` is computed: its own time plus that of hashing the state, which thinwire does
    while a block is in cache.

    Raises:
        NotLosslessError: a codec lost something.
    """
    threads = thread_count(threads)
    before = load()
    with ThreadPoolExecutor(threads) as pool:
        arena = _arena(pair, threads, pool)
        codecs: list[Codec] = [_Thinwire(arena, level, values) for level, values in THINWIRE]
        if peers:
            codecs += [_Other(arena, peer) for peer in PEERS]
        rows = _measure(codecs, arena, repeats, report)
        base = _base_costs(arena, repeats)
        for row in rows:
            _finish(row, base)
        if peers:
            small = _arena(_sample(pair), threads, pool)
            found = _measure([_Other(small, PATCH_FROM)], small, min(repeats, 2), report)
            for row in found:
                _finish(row, _base_costs(small, repeats))
            rows += found
    for level in ("small", "smallest"):
        report(f"{level}: through a folder")
        rows.append(end_to_end(pair, level=level, repeats=repeats, threads=threads))
    report("single-thread costs by stage")
    entropy = entropy_of(pair.old, pair.new)
    common = {
        "workload": {"name": pair.workload, **pair.facts},
        "entropy": {"plain": round(entropy.plain, 4), "exponent": round(entropy.exponent, 4)},
        "threads": threads,
        "load_before": before,
        "load_after": load(),
        "machine": machine(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **base,
    }
    rows.append({"bench": "stages", "state_bytes": pair.size, "seconds_per_gib": stage_costs(pair, repeats)})
    return [{**row, **common} for row in rows]

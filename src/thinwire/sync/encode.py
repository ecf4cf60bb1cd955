"""From two states to a patch, in one pass over memory: diff, encode, hash and keep, block by block, on all cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from thinwire.errors import MisuseError, RefuseError
from thinwire.sync.layout import Block, CellSource, Layout, Stripe, stripes
from thinwire.tensors.digest import hash_block
from thinwire.tensors.kernels import advance, find_changed, take_changed
from thinwire.wire import rans
from thinwire.wire.context import ContextWriter, Histogram, choose_bounds
from thinwire.wire.digests import TensorInfo, Tree, tensor_digest
from thinwire.wire.patch import Patch, Row, SegmentRow
from thinwire.wire.segment import Changes, encode_context, encode_gaps, encode_packed, encode_raw
from thinwire.wire.spec import VALUES, DType

__all__ = ["LEVELS", "Options", "Progress", "Snapshot", "encode_changes", "make_patch", "take_snapshot", "thread_count"]

Cells = npt.NDArray[np.unsignedinteger]
Progress = Callable[[int, int], None]
"""Called with (bytes of state done, bytes of state in all), from any thread."""

SEGMENT_CHANGES = 1 << 20  # a segment is closed when it has this many changes, so that memory stays bounded
LEVELS = {
    "fast": ("packed", rans.EFFORT_FAST),
    "small": ("gaps", rans.EFFORT_SMALL),
    "smallest": ("context", rans.EFFORT_SMALL),
}
_SAMPLE = 64  # one cell in so many is looked at to choose the classes


@dataclass(frozen=True, slots=True)
class Options:
    """How a patch is made. ``threads`` 0 means one a core."""

    level: str = "small"
    values: str = "ulp"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise MisuseError(f"level must be one of {', '.join(LEVELS)}, not {self.level!r}")
        if self.values not in VALUES:
            raise MisuseError(f"values must be one of {', '.join(VALUES)}, not {self.values!r}")


def encode_changes(changes: Changes, dtype: DType, *, level: str, values: str) -> bytes:
    """A segment's changes without the base's context, packed or entropy-coded as ``level`` says."""
    codec, effort = LEVELS[level]
    if codec == "packed":
        return encode_packed(changes, dtype, values=values)
    return encode_gaps(changes, dtype, values=values, effort=effort)


def thread_count(threads: int) -> int:
    """``threads``, or the number of cores this process may use (at most 32)."""
    return threads or min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass(slots=True)
class Snapshot:
    """The last published state: its cells, the digests of its blocks, and its tree.

    ``intact`` is False while, or after, an update was broken off in the middle; its cells are then of no version.
    """

    layouts: dict[str, Layout]
    cells: dict[str, Cells]
    leaves: dict[str, list[bytes]]
    tree: Tree
    intact: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def aliases(self) -> Mapping[str, str]:
        return self.tree.aliases

    def read(self, name: str, start: int, stop: int) -> Cells:
        return self.cells[name][start:stop]

    @property
    def size(self) -> int:
        """Bytes of the state."""
        return sum(layout.size for layout in self.layouts.values())


def _tree(
    hash_name: str, layouts: Mapping[str, Layout], leaves: Mapping[str, list[bytes]], aliases: Mapping[str, str]
) -> Tree:
    tensors = {}
    for name, layout in layouts.items():
        digest = tensor_digest(hash_name, layout.dtype.name, layout.shape, leaves[name])
        tensors[name] = TensorInfo(layout.dtype.name, layout.shape, digest)
    return Tree(hash_name, tensors, dict(aliases))


def _copy_tensor(
    source: CellSource, name: str, layout: Layout, hash_name: str, pool: ThreadPoolExecutor
) -> tuple[Cells, list[bytes]]:
    cells = np.empty(layout.cells, layout.dtype.cells)

    def one(block: Block) -> bytes:
        part = cells[block.start : block.stop]
        part[:] = source.read(name, block.start, block.stop)
        return hash_block(hash_name, part)

    blocks = [b for stripe in stripes([(name, layout)]) for b in stripe.blocks]
    return cells, list(pool.map(one, blocks))


def take_snapshot(source: CellSource, *, hash_name: str = "blake3", threads: int = 0) -> Snapshot:
    """Copy a state and hash it."""
    cells: dict[str, Cells] = {}
    leaves: dict[str, list[bytes]] = {}
    with ThreadPoolExecutor(thread_count(threads)) as pool:
        for name, layout in source.layouts.items():
            cells[name], leaves[name] = _copy_tensor(source, name, layout, hash_name, pool)
    layouts = dict(source.layouts)
    return Snapshot(layouts, cells, leaves, _tree(hash_name, layouts, leaves, source.aliases))


@dataclass(slots=True)
class _StripeResult:
    segments: list[tuple[SegmentRow, bytes]]
    changed: dict[str, int]
    leaves: list[tuple[Block, bytes]]


class _StripeEncoder:
    """Encodes one stripe and moves the snapshot's cells on to the new state."""

    def __init__(self, stripe: Stripe, snapshot: Snapshot, source: CellSource, options: Options) -> None:
        self.dtype: DType = stripe.dtype
        self.stripe, self.snapshot, self.source, self.options = stripe, snapshot, source, options
        self.bounds: tuple[int, ...] = ()
        if LEVELS[options.level][0] == "context" and self.dtype.is_float:
            self.bounds = self._choose()
        self.result = _StripeResult([], {}, [])

    def _choose(self) -> tuple[int, ...]:
        histogram = Histogram(self.dtype)
        seen = 0
        for k, block in enumerate(self.stripe.blocks):
            length = -(-(block.stop - block.start) // _SAMPLE)
            start = block.start + (k * 5 % _SAMPLE) * length
            stop = min(start + length, block.stop)
            if start < stop:
                old = self.snapshot.read(block.name, start, stop)
                histogram.add(old, self.source.read(block.name, start, stop), stride=1)
                seen += stop - start
        return choose_bounds(histogram, scale=self.stripe.cells / max(seen, 1))

    def run(self) -> _StripeResult:
        dtype, values = self.dtype, self.options.values
        room = min(self.stripe.cells, SEGMENT_CHANGES + max(b.stop - b.start for b in self.stripe.blocks))
        positions, codes = np.empty(room, np.uint32), np.empty(room, dtype.cells)
        classes = gaps = None
        if self.bounds:
            classes, gaps = np.empty(room, np.uint8), np.empty(room, np.uint32)
        writer, begun, offset, found = None, 0, 0, 0
        for k, block in enumerate(self.stripe.blocks):
            if self.bounds and writer is None:
                writer = ContextWriter(dtype, self.bounds)
            old = self.snapshot.read(block.name, block.start, block.stop)
            new = self.source.read(block.name, block.start, block.stop)
            first, is_float = found, dtype.is_float
            if writer is None or classes is None or gaps is None:
                found = take_changed(old, new, offset, positions, codes, found, is_float=is_float, values=values)
            else:  # the classes are those of the old cells
                found = find_changed(old, new, offset, positions, codes, found, is_float=is_float, values=values)
                writer.add(old, offset, positions, first, found, classes, gaps)
                advance(old, offset, positions, codes, first, found, is_float=is_float, values=values)
            if found > first:
                self.result.leaves.append((block, hash_block(self.snapshot.tree.hash, old)))
                self.result.changed[block.name] = self.result.changed.get(block.name, 0) + found - first
            offset += block.stop - block.start
            if found >= SEGMENT_CHANGES or k == len(self.stripe.blocks) - 1:
                changes = Changes(positions[:found], codes[:found])
                context = None if classes is None or gaps is None else (classes[:found], gaps[:found])
                self._close(self.stripe.blocks[begun : k + 1], offset, changes, context)
                writer, begun, offset, found = None, k + 1, 0, 0
        return self.result

    def _close(
        self,
        blocks: tuple[Block, ...],
        cells: int,
        changes: Changes,
        context: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]] | None,
    ) -> None:
        changed = changes.positions.size
        data = b""
        if changed:
            values, level = self.options.values, self.options.level
            if context is None:
                data = encode_changes(changes, self.dtype, level=level, values=values)
            else:
                classes, gaps = context
                data = encode_context(
                    changes.codes, classes, gaps, self.bounds, self.dtype, values=values, effort=LEVELS[level][1]
                )
            if len(data) > cells * self.dtype.cell_bytes:
                data = encode_raw([self.snapshot.read(b.name, b.start, b.stop) for b in blocks])
        self.result.segments.append((SegmentRow(self.dtype.name, cells, changed, len(data)), data))


def make_patch(
    snapshot: Snapshot,
    source: CellSource,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
    group_of: Callable[[str], object] | None = None,
) -> Patch:
    """The patch from ``snapshot`` to ``source``; afterwards ``snapshot`` *is* that state.

    No segment reaches from tensors of one group, as ``group_of`` tells them by name, to those of the next.

    Raises:
        RefuseError: the snapshot is not intact.
    """
    options = options or Options()
    if not snapshot.intact:
        raise RefuseError("the last state held in memory was left half-way by an error; start a new publisher")
    began = time.perf_counter()
    snapshot.intact = False
    parent, hash_name = snapshot.tree.digest, snapshot.tree.hash
    same = [(name, layout) for name, layout in source.layouts.items() if snapshot.layouts.get(name) == layout]
    total = sum(layout.size for layout in source.layouts.values())
    done = 0

    def encode(stripe: Stripe) -> _StripeResult:
        nonlocal done
        result = _StripeEncoder(stripe, snapshot, source, options).run()
        done += stripe.cells * stripe.dtype.cell_bytes
        if progress is not None:
            progress(done, total)
        return result

    fresh = {name: layout for name, layout in source.layouts.items() if snapshot.layouts.get(name) != layout}
    old_digests = {(t.dtype, t.shape, t.digest): name for name, t in snapshot.tree.tensors.items()}
    with ThreadPoolExecutor(thread_count(options.threads)) as pool:
        added = {name: _copy_tensor(source, name, layout, hash_name, pool) for name, layout in fresh.items()}
        results = list(pool.map(encode, stripes(same, group_of=group_of)))
    changed: dict[str, int] = {}
    for result in results:
        for name, count in result.changed.items():
            changed[name] = changed.get(name, 0) + count
        for block, leaf in result.leaves:
            snapshot.leaves[block.name][block.index] = leaf
    removed = sorted(set(snapshot.layouts) - set(source.layouts))
    for name in removed:
        del snapshot.cells[name], snapshot.leaves[name]
    for name, (cells, leaves) in added.items():
        snapshot.cells[name], snapshot.leaves[name] = cells, leaves
    snapshot.layouts = dict(source.layouts)
    snapshot.tree = _tree(hash_name, snapshot.layouts, snapshot.leaves, source.aliases)
    rows, raw = [], {}
    for name, layout in snapshot.layouts.items():
        info = snapshot.tree.tensors[name]
        moved = old_digests.get((info.dtype, info.shape, info.digest))
        if name not in fresh:
            rows.append(Row(name, layout.dtype.name, layout.shape, "sparse", changed=changed.get(name, 0)))
        elif moved is not None:
            rows.append(Row(name, layout.dtype.name, layout.shape, "moved", source=moved))
        else:
            rows.append(Row(name, layout.dtype.name, layout.shape, "raw"))
            raw[name] = snapshot.cells[name].data.cast("B") if layout.cells else b""
    segments = [segment for result in results for segment in result.segments]
    snapshot.intact = True
    snapshot.seconds = {"encode": time.perf_counter() - began}
    return Patch(
        parent=parent,
        result=snapshot.tree.digest,
        hash=hash_name,
        values=options.values,
        level=options.level,
        rows=tuple(rows),
        removed=tuple(removed),
        aliases=dict(source.aliases),
        segment_rows=tuple(row for row, _ in segments),
        segments=[data for _, data in segments],
        raw=raw,
    )

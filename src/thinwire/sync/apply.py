"""From a state and a patch to the next state: a transaction over the cells, proved by the result's digest.

Everything that can be refused is refused before the first cell is written. The overwritten cells take the place of the
decoded ones, so undo needs no memory of its own; they are put back if anything at all goes wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from thinwire.errors import DamagedObjectError, MalformedError, WrongBaseError
from thinwire.sync.encode import Progress, thread_count
from thinwire.sync.layout import Layout
from thinwire.tensors.digest import block_cells, block_count, hash_block
from thinwire.tensors.kernels import swap_absolute, swap_steps
from thinwire.wire.digests import TensorInfo, Tree, tensor_digest
from thinwire.wire.patch import Patch, Row, SegmentRow
from thinwire.wire.segment import Changes, decode_segment
from thinwire.wire.spec import cell_count, dtype_of

__all__ = ["ApplyReport", "apply_patch", "check_fits", "tree_of"]

Cells = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What an apply did: the tree of the result, changed cells, seconds by stage.

    ``touched`` holds the changed positions of the tensors that were asked for; None stands for all.
    """

    tree: Tree
    changed: int
    seconds: dict[str, float]
    touched: dict[str, npt.NDArray[np.int64] | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Cells ``start`` to ``stop`` of a tensor; they begin at ``offset`` in their segment."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(slots=True)
class _Work:
    """One segment: its row, its bytes, where its cells lie; after decoding, its changes (then what they replaced)."""

    row: SegmentRow
    data: bytes | memoryview
    pieces: list[_Piece]
    changes: Changes | Cells | None = None
    done: list[_Piece] = field(default_factory=list)


def _pieces(rows: Sequence[Row], segments: Sequence[SegmentRow]) -> list[list[_Piece]]:
    queues: dict[str, Iterator[tuple[str, int]]] = {}
    for dtype in {s.dtype for s in segments}:
        members = [(row.name, row.cells) for row in rows if row.kind == "sparse" and row.dtype == dtype]
        queues[dtype] = iter(members)
    held: dict[str, tuple[str, int, int]] = {}
    found: list[list[_Piece]] = []
    for segment in segments:
        offset, pieces = 0, []
        while offset < segment.cells:
            name, at, size = held.get(segment.dtype, ("", 0, 0))
            if at == size:
                name, size = next(queues[segment.dtype])
                at = 0
            take = min(size - at, segment.cells - offset)
            if take:
                pieces.append(_Piece(name, at, at + take, offset))
            offset += take
            held[segment.dtype] = (name, at + take, size)
        found.append(pieces)
    return found


def check_fits(patch: Patch, layouts: Mapping[str, Layout]) -> None:
    """Whether the patch's tensors can be those of this base, by names, data types and shapes.

    Raises:
        WrongBaseError: they cannot.
    """
    for row in patch.rows:
        name = row.source if row.kind == "moved" else row.name
        wanted = Layout(dtype_of(row.dtype), row.shape)
        if row.kind in ("sparse", "moved") and layouts.get(name) != wanted:
            at_hand = layouts.get(name)
            raise WrongBaseError(
                f"the patch changes {name!r} as {row.dtype} {row.shape}, the base "
                + (f"has it as {at_hand.dtype.name} {at_hand.shape}" if at_hand else "has no such tensor"),
                tensor=name,
            )
    unnamed = set(layouts) - {row.name for row in patch.rows} - set(patch.removed)
    if unnamed:
        raise WrongBaseError(f"the base has tensors that the patch does not know: {sorted(unnamed)[:3]}")


def tree_of(
    layouts: Mapping[str, Layout],
    cells: Mapping[str, Cells],
    aliases: Mapping[str, str],
    *,
    hash_name: str = "blake3",
    threads: int = 0,
    progress: Progress | None = None,
) -> Tree:
    """Hash a whole state."""
    total, done = sum(layout.size for layout in layouts.values()), 0

    def leaves_of(job: tuple[str, int, int]) -> list[bytes]:
        nonlocal done
        name, first, last = job
        step = block_cells(layouts[name].dtype.cell_bytes)
        found = [hash_block(hash_name, cells[name][i * step : (i + 1) * step]) for i in range(first, last)]
        done += (last - first) * step * layouts[name].dtype.cell_bytes
        if progress is not None:
            progress(min(done, total), total)
        return found

    jobs = []
    for name, layout in layouts.items():
        count = block_count(layout.cells, layout.dtype.cell_bytes)
        jobs += [(name, first, min(first + 16, count)) for first in range(0, count, 16)]
    leaves: dict[str, list[bytes]] = {name: [] for name in layouts}
    with ThreadPoolExecutor(thread_count(threads)) as pool:
        for job, found in zip(jobs, pool.map(leaves_of, jobs), strict=True):
            leaves[job[0]] += found
    tensors = {
        name: TensorInfo(x.dtype.name, x.shape, tensor_digest(hash_name, x.dtype.name, x.shape, leaves[name]))
        for name, x in layouts.items()
    }
    return Tree(hash_name, tensors, dict(aliases))


class _Transaction:
    """Applies decoded segments to cells and can take them back."""

    def __init__(self, patch: Patch, cells: dict[str, Cells], works: list[_Work]) -> None:
        self.patch, self.cells, self.works = patch, cells, works
        self.leaves: dict[tuple[str, int], bytes] = {}

    def _swap(self, work: _Work, piece: _Piece, first: int, absolute: bool) -> int:
        changes = work.changes
        part = self.cells[piece.name][piece.start : piece.stop]
        if isinstance(changes, Changes):
            if absolute:
                return swap_absolute(part, piece.offset, changes.positions, changes.codes, first)
            is_float = dtype_of(work.row.dtype).is_float
            return swap_steps(part, piece.offset, changes.positions, changes.codes, first, is_float=is_float)
        if changes is not None:
            stored = changes[piece.offset : piece.offset + piece.stop - piece.start]
            kept = part.copy()
            part[:] = stored
            stored[:] = kept
        return 0

    def apply(self, work: _Work) -> None:
        """Write one segment's changes, hashing each block that lies wholly in it while it is in cache."""
        step = block_cells(dtype_of(work.row.dtype).cell_bytes)
        absolute = self.patch.values == "absolute"
        first = 0
        for piece in work.pieces:
            size = self.cells[piece.name].size
            at = piece.start
            while at < piece.stop:
                stop = min(piece.stop, (at // step + 1) * step)
                part = _Piece(piece.name, at, stop, piece.offset + at - piece.start)
                first = self._swap(work, part, first, absolute)
                work.done.append(part)  # threads of a pool get no signals: nothing comes between the two
                if at % step == 0 and (stop == size or stop - at == step):
                    leaf = hash_block(self.patch.hash, self.cells[piece.name][at:stop])
                    self.leaves[piece.name, at // step] = leaf
                at = stop

    def undo(self) -> None:
        """Put every overwritten cell back."""
        for work in self.works:
            first = 0
            for part in work.done:
                first = self._swap(work, part, first, True)
            work.done.clear()

    def tree(self, layouts: Mapping[str, Layout], cells: Mapping[str, Cells]) -> Tree:
        """The result's tree; blocks that were not hashed on the way are hashed now."""
        tensors = {}
        for name, layout in layouts.items():
            step = block_cells(layout.dtype.cell_bytes)
            leaves = []
            for i in range(block_count(layout.cells, layout.dtype.cell_bytes)):
                leaf = self.leaves.get((name, i))
                leaves.append(leaf or hash_block(self.patch.hash, cells[name][i * step : (i + 1) * step]))
            digest = tensor_digest(self.patch.hash, layout.dtype.name, layout.shape, leaves)
            tensors[name] = TensorInfo(layout.dtype.name, layout.shape, digest)
        return Tree(self.patch.hash, tensors, dict(self.patch.aliases))


def _decode(work: _Work, patch: Patch, cells: Mapping[str, Cells]) -> None:
    dtype = dtype_of(work.row.dtype)
    if work.row.changed:
        base = [cells[p.name][p.start : p.stop] for p in work.pieces]
        found = decode_segment(
            memoryview(work.data), dtype, cells=work.row.cells, changed=work.row.changed, values=patch.values, base=base
        )
        work.changes = found if isinstance(found, Changes) else found.copy()  # swapped in place later


def _check_counts(patch: Patch, works: Sequence[_Work]) -> None:
    """The changes of each tensor must be as many as its row says, or a report made from the table would lie."""
    counts: dict[str, int] = {}
    raw: set[str] = set()
    for work in works:
        for piece in work.pieces:
            if isinstance(work.changes, Changes):
                bounds = np.array([piece.offset, piece.offset + piece.stop - piece.start], np.uint32)  # or all are cast
                ends = np.searchsorted(work.changes.positions, bounds)
                counts[piece.name] = counts.get(piece.name, 0) + int(ends[1] - ends[0])
            elif work.changes is not None:
                raw.add(piece.name)
    for row in patch.rows:
        if row.kind == "sparse" and row.name not in raw and counts.get(row.name, 0) != row.changed:
            raise MalformedError(
                f"the table gives {row.name!r} {row.changed} changes, the segments {counts.get(row.name, 0)}"
            )


def apply_patch(
    patch: Patch,
    layouts: dict[str, Layout],
    cells: dict[str, Cells],
    *,
    aliases: Mapping[str, str] | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    watch: Collection[str] = (),
    agrees: Callable[[Tree], bool] | None = None,
) -> ApplyReport:
    """Change ``cells`` (1-d, writable, by name) in place from the patch's parent to its result.

    ``layouts`` and ``cells`` get the result's tensors: entries are added and removed as the patch says. Whether the
    base is the parent shows in the result's digest, which is computed from the cells as they are then; if it differs,
    or if anything raises, all cells are put back first. The report tells the changed positions of the tensors in
    ``watch``. Who holds a part of a state only says by ``agrees`` whether a tree is that of the result.

    Raises:
        WrongBaseError: the base has other tensors, or other contents, than the patch's parent; both digests are named.
        MalformedError, UnsupportedError: the patch is damaged.
        DamagedObjectError: the base *is* the parent, yet the result is not what the patch promises.
    """
    began = time.perf_counter()
    check_fits(patch, layouts)
    pieces = _pieces(patch.rows, patch.segment_rows)
    works = [_Work(r, d, p) for r, d, p in zip(patch.segment_rows, patch.segments, pieces, strict=True)]
    after_layouts = {row.name: Layout(dtype_of(row.dtype), row.shape) for row in patch.rows}
    total = sum(layout.size for layout in after_layouts.values())
    transaction = _Transaction(patch, cells, works)
    progressed = 0

    def apply(work: _Work) -> None:
        nonlocal progressed
        transaction.apply(work)
        progressed += work.row.cells * dtype_of(work.row.dtype).cell_bytes
        if progress is not None:
            progress(progressed, total)

    with ThreadPoolExecutor(thread_count(threads)) as pool:
        try:
            list(pool.map(lambda work: _decode(work, patch, cells), works))
            _check_counts(patch, works)
        except MalformedError as error:  # in context, another base makes a good patch look damaged
            _refuse_base(patch, layouts, cells, aliases or {}, error)
            raise
        fresh = _fresh_tensors(patch, cells)
        decoded = time.perf_counter()
        try:
            _drain([pool.submit(apply, work) for work in works])
            applied = time.perf_counter()
            after_cells = {name: fresh.get(name, cells.get(name, _NOTHING)) for name in after_layouts}
            tree = transaction.tree(after_layouts, after_cells)
            if not (tree.digest == patch.result if agrees is None else agrees(tree)):
                transaction.undo()
                _refuse(patch, layouts, cells, aliases or {}, tree.digest)
        except BaseException:
            transaction.undo()
            raise
    for name in set(cells) - set(after_cells):
        del cells[name]
    cells.update(fresh)
    layouts.clear()
    layouts.update(after_layouts)
    ended = time.perf_counter()
    seconds = {"decode": decoded - began, "apply": applied - decoded, "verify": ended - applied, "total": ended - began}
    return ApplyReport(tree, patch.changed, seconds, _touched(works, watch))


_NOTHING: Cells = np.empty(0, np.uint8)


def _drain(futures: Sequence[Future[None]]) -> None:
    """Wait for all, then raise the first failure: nothing may still be writing when the undo begins."""
    try:
        wait(futures)
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)
        raise
    for future in futures:
        future.result()


def _touched(works: Sequence[_Work], watch: Collection[str]) -> dict[str, npt.NDArray[np.int64] | None]:
    parts: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in watch}
    whole: set[str] = set()
    for work in works:
        for piece in work.pieces:
            if piece.name in parts and isinstance(work.changes, Changes):
                positions = work.changes.positions
                first, last = np.searchsorted(positions, [piece.offset, piece.offset + piece.stop - piece.start])
                parts[piece.name].append(positions[first:last].astype(np.int64) + (piece.start - piece.offset))
            elif piece.name in parts and work.changes is not None:
                whole.add(piece.name)
    none = np.empty(0, np.int64)
    return {name: None if name in whole else np.concatenate([none, *found]) for name, found in parts.items()}


def _fresh_tensors(patch: Patch, cells: Mapping[str, Cells]) -> dict[str, Cells]:
    fresh: dict[str, Cells] = {}
    for row in patch.rows:
        dtype = dtype_of(row.dtype)
        if row.kind == "raw":
            fresh[row.name] = np.frombuffer(patch.raw[row.name], dtype.cells, count=cell_count(dtype, row.shape)).copy()
        elif row.kind == "moved":
            fresh[row.name] = cells[row.source].copy()
    return fresh


def _refuse_base(
    patch: Patch,
    layouts: Mapping[str, Layout],
    cells: Mapping[str, Cells],
    aliases: Mapping[str, str],
    cause: Exception | None = None,
) -> None:
    base = tree_of(layouts, cells, aliases, hash_name=patch.hash).digest
    if base != patch.parent:
        raise WrongBaseError(
            f"these weights are {base}, the patch is for {patch.parent}; nothing was changed. "
            "Load the version that the patch starts from, or an anchor",
            expected=patch.parent,
            actual=base,
        ) from cause


def _refuse(
    patch: Patch, layouts: Mapping[str, Layout], cells: Mapping[str, Cells], aliases: Mapping[str, str], got: str
) -> None:
    _refuse_base(patch, layouts, cells, aliases)
    raise DamagedObjectError(
        f"the patch leads to {got} instead of {patch.result}; nothing was changed. Fetch it again",
        expected=patch.result,
        actual=got,
    )

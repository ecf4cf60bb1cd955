"""Several patches as one, from the first's parent straight to the last's result.

Composing needs no weights where the patches say by themselves which cells change: steps in numeric order add up
(modulo the cell's width, so exactly), and of new cells the later one wins. It needs the weights that the first patch
starts from where a patch was coded in the context of its base's exponents, holds a part of a tensor as a whole, copies
a tensor that has changed before, or where steps and new cells mix.

Without weights, memory holds the patches' changes (8 bytes and a cell each) and no more; with them, two states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from thinwire.errors import MalformedError, MisuseError, WrongBaseError
from thinwire.sync.apply import apply_patch
from thinwire.sync.encode import SEGMENT_CHANGES, Options, encode_changes, make_patch, take_snapshot, thread_count
from thinwire.sync.layout import Block, CellSource, Layout, MemorySource, Stripe, stripes
from thinwire.tensors.composing import merge_changes
from thinwire.wire.patch import Patch, Row, SegmentRow
from thinwire.wire.segment import Changes, decode_segment, encode_raw
from thinwire.wire.spec import CODEC_CONTEXT, DType, dtype_of
from thinwire.wire.values import apply_steps

__all__ = ["compose", "in_context", "without_context"]

Cells = npt.NDArray[np.unsignedinteger]
Positions = npt.NDArray[np.int64]
_NOWHERE: Positions = np.empty(0, np.int64)


@dataclass(slots=True)
class _Tensor:
    """How one tensor of the result comes about: changes of the base's, or new cells, or a copy of ``source``.

    A sparse one may be ``known`` whole, too: its cells were sent as they are, because nearly all of them had changed.
    """

    layout: Layout
    kind: str
    positions: Positions = field(default_factory=lambda: _NOWHERE)
    codes: Cells = field(default_factory=lambda: np.empty(0, np.uint8))
    cells: Cells = field(default_factory=lambda: np.empty(0, np.uint8))
    known: bool = False
    source: str = ""

    @property
    def changed(self) -> int:
        """Cells of a sparse tensor that are sent."""
        return self.layout.cells if self.known else int(self.positions.size)


def in_context(patch: Patch) -> bool:
    """Whether a segment is coded in the context of the base, without which it cannot be read."""
    segments = zip(patch.segment_rows, patch.segments, strict=True)
    return any(row.changed and data[0] == CODEC_CONTEXT for row, data in segments)


def compose(*patches: Patch, base: CellSource | None = None, options: Options | None = None) -> Patch:
    """One patch that does what ``patches`` do one after another: exact, bit for bit, for every data type.

    ``base`` is the state that the first patch starts from; it is read, not changed, and only needed where
    the patches do not suffice. Level and value codec of ``options`` hold where the base is used; without it the
    values stay as they are and positions are plain gaps (``smallest`` becomes ``small``).

    Associative: ``compose(compose(a, b), c)`` and ``compose(a, compose(b, c))`` have the same effect and, where the
    base is not needed, the same bytes.

    Raises:
        WrongBaseError: a patch does not start where the one before ends, or ``base`` is not where the first starts.
        MisuseError: no patches; they use two hashes; or the base is needed and not given. The message says why.
        MalformedError: a patch is damaged.

    >>> import torch
    >>> from thinwire.sync.layout import StateSource
    >>> from thinwire.tensors.tree import state_of
    >>> states = [StateSource(state_of({"w": torch.full((4,), 1.0 + k)})) for k in range(3)]
    >>> snapshot = take_snapshot(states[0])
    >>> a, b = make_patch(snapshot, states[1]), make_patch(snapshot, states[2])
    >>> both = compose(a, b)
    >>> (both.parent, both.result, both.changed) == (a.parent, b.result, 4)
    True
    """
    if not patches:
        raise MisuseError("there is no patch to compose")
    _check_chain(patches)
    options = options or Options()
    reason = "a segment is coded in the context of the base" if any(map(in_context, patches)) else ""
    if not reason and len({patch.values for patch in patches}) > 1:
        reason = "steps and new values mix"
    if not reason:
        try:
            held = _decoded(patches[0])
            for patch in patches[1:]:
                held = _then(held, _decoded(patch), patch)
            return _encoded(held, patches, options)
        except _NeedsBaseError as error:
            reason = str(error)
    if base is None:
        raise MisuseError(f"these patches cannot be composed without the weights that they start from: {reason}")
    return _replayed(patches, base, options)


class _NeedsBaseError(Exception):
    """What the patches say does not suffice."""


def _check_chain(patches: Sequence[Patch]) -> None:
    for before, after in pairwise(patches):
        if before.hash != after.hash:
            raise MisuseError(f"a patch of {before.hash} digests and one of {after.hash} digests do not compose")
        if before.result != after.parent:
            raise WrongBaseError(
                f"a patch starts from {after.parent}, the one before it ends at {before.result}",
                expected=after.parent,
                actual=before.result,
            )


def _replayed(patches: Sequence[Patch], base: CellSource, options: Options) -> Patch:
    """Go the whole way from the base, every step proved by its digest, and see what has changed in the end."""
    snapshot = take_snapshot(base, hash_name=patches[0].hash, threads=options.threads)
    if snapshot.tree.digest != patches[0].parent:
        raise WrongBaseError(
            f"the base is {snapshot.tree.digest}, the first patch is for {patches[0].parent}",
            expected=patches[0].parent,
            actual=snapshot.tree.digest,
        )
    cells = {name: part.copy() for name, part in snapshot.cells.items()}
    source = MemorySource(snapshot.layouts, cells, snapshot.aliases)
    for patch in patches:
        report = apply_patch(patch, source.layouts, source.cells, aliases=source.aliases, threads=options.threads)
        source.aliases = dict(report.tree.aliases)
    source.layouts = dict(sorted(source.layouts.items()))
    return make_patch(snapshot, source, options)


# --- from a patch to changes by tensor -----------------------------------------------------------------------------


@dataclass(slots=True)
class _Stream:
    """The changes of all sparse tensors of one data type; positions count through all of them.

    ``whole`` holds what was sent whole: where it starts, and its cells.
    """

    positions: Positions
    codes: Cells
    whole: list[tuple[int, Cells]]

    def tensor(self, row: Row, offset: int) -> _Tensor:
        """The tensor of ``row``, whose cells start at ``offset``."""
        layout, stop = Layout(dtype_of(row.dtype), row.shape), offset + row.cells
        for start, cells in self.whole:
            if start < stop and offset < start + cells.size and row.cells:
                if start > offset or stop > start + cells.size:
                    raise _NeedsBaseError(f"a part of {row.name!r} was sent whole")
                return _Tensor(layout, "sparse", cells=cells[offset - start : stop - start], known=True)
        first, last = map(int, np.searchsorted(self.positions, [offset, stop]))
        if last - first != row.changed:
            raise MalformedError(f"the table gives {row.name!r} {row.changed} changes, the segments {last - first}")
        return _Tensor(layout, "sparse", self.positions[first:last] - offset, self.codes[first:last])


def _stream_of(patch: Patch, dtype_name: str, base: Mapping[str, Cells] | None) -> _Stream:
    dtype = dtype_of(dtype_name)
    members = [row for row in patch.rows if row.kind == "sparse" and row.dtype == dtype_name]
    vector = None if base is None else _Vector([base[row.name] for row in members])
    positions, codes, offset = [_NOWHERE], [np.empty(0, dtype.cells)], 0
    whole = []
    for row, data in zip(patch.segment_rows, patch.segments, strict=True):
        if row.dtype != dtype_name:
            continue
        if row.changed:
            pieces = [] if vector is None else vector.pieces(offset, offset + row.cells)
            found = decode_segment(
                memoryview(data), dtype, cells=row.cells, changed=row.changed, values=patch.values, base=pieces
            )
            if isinstance(found, Changes):
                positions.append(found.positions.astype(np.int64) + offset)
                codes.append(found.codes)
            else:
                whole.append((offset, found))
        offset += row.cells
    return _Stream(np.concatenate(positions), np.concatenate(codes), whole)


class _Vector:
    """The cells of several tensors, one after another, cut anywhere without a copy."""

    def __init__(self, parts: Sequence[Cells]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(part.size for part in parts)])

    def pieces(self, start: int, stop: int) -> list[Cells]:
        """Views of the cells ``start`` to ``stop``."""
        found = []
        for part, at in zip(self._parts, self._starts[:-1].tolist(), strict=True):
            piece = part[max(start - at, 0) : max(stop - at, 0)]
            if piece.size:
                found.append(piece)
        return found


def _decoded(patch: Patch, base: Mapping[str, Cells] | None = None) -> dict[str, _Tensor]:
    """Every tensor of a patch's result by name. ``base`` is read for segments in context only."""
    found: dict[str, _Tensor] = {}
    for dtype_name in sorted({row.dtype for row in patch.rows if row.kind == "sparse"}):
        stream, offset = _stream_of(patch, dtype_name, base), 0
        for row in patch.rows:
            if row.kind == "sparse" and row.dtype == dtype_name:
                found[row.name] = stream.tensor(row, offset)
                offset += row.cells
    for row in patch.rows:
        layout = Layout(dtype_of(row.dtype), row.shape)
        if row.kind == "raw":
            cells = np.frombuffer(patch.raw[row.name], layout.dtype.cells, count=layout.cells)
            found[row.name] = _Tensor(layout, "raw", cells=cells)
        elif row.kind == "moved":
            found[row.name] = _Tensor(layout, "moved", source=row.source)
    return found


# --- one after another ---------------------------------------------------------------------------------------------


def _then(first: Mapping[str, _Tensor], second: Mapping[str, _Tensor], patch: Patch) -> dict[str, _Tensor]:
    """What ``first`` and then ``second``, decoded from ``patch``, make of the first's base."""
    gone = sorted(name for name in patch.removed if name in first and first[name].kind != "sparse")
    if gone:
        raise _NeedsBaseError(f"{gone[0]!r} is brought and removed again, so the base may have another of this name")
    absolute = patch.values == "absolute"
    found = {}
    for name, after in second.items():
        if after.kind == "raw":
            found[name] = after
            continue
        before = first.get(after.source if after.kind == "moved" else name)
        if before is None or before.layout != after.layout:
            raise WrongBaseError(f"a patch changes {name!r}, which the one before it does not leave like that")
        found[name] = _moved_on(name, before, after) if after.kind == "moved" else _changed(before, after, absolute)
    return found


def _moved_on(name: str, before: _Tensor, after: _Tensor) -> _Tensor:
    if before.kind == "raw":
        return before
    if before.kind == "moved":
        return _Tensor(after.layout, "moved", source=before.source)
    if before.known:
        return _Tensor(after.layout, "raw", cells=before.cells)
    if before.positions.size:
        raise _NeedsBaseError(f"{name!r} is a copy of a tensor that has changed before")
    return _Tensor(after.layout, "moved", source=after.source)


def _changed(before: _Tensor, after: _Tensor, absolute: bool) -> _Tensor:
    if after.known and before.kind != "moved":
        return _Tensor(after.layout, before.kind, cells=after.cells, known=before.kind == "sparse")
    if before.kind == "sparse" and not before.known:
        positions, codes = merge_changes(
            before.positions, before.codes, after.positions, after.codes, absolute=absolute
        )
        return _Tensor(after.layout, "sparse", positions, codes)
    if not after.changed:
        return before
    if before.kind == "moved":
        raise _NeedsBaseError(f"a copy of {before.source!r} is changed")
    cells = before.cells.copy()
    old = cells[after.positions]
    cells[after.positions] = (
        after.codes if absolute else apply_steps(old, after.codes, is_float=after.layout.dtype.is_float)
    )
    return _Tensor(after.layout, before.kind, cells=cells, known=before.known)


# --- and back to a patch -------------------------------------------------------------------------------------------


def _removed(patches: Sequence[Patch], names: Mapping[str, object]) -> tuple[str, ...]:
    """The base's tensors that the result no longer has."""
    first = patches[0]
    theirs = {row.name for row in first.rows if row.kind == "sparse"} | set(first.removed)
    theirs |= {row.source for row in first.rows if row.kind == "moved"}
    return tuple(sorted(theirs - set(names)))


def _encoded(held: Mapping[str, _Tensor], patches: Sequence[Patch], options: Options) -> Patch:
    values, level = patches[0].values, "fast" if options.level == "fast" else "small"
    held = dict(sorted(held.items()))
    sparse = [(name, item.layout) for name, item in held.items() if item.kind == "sparse"]
    with ThreadPoolExecutor(thread_count(options.threads)) as pool:
        parts = pool.map(lambda stripe: _stripe_segments(stripe, held, values, level), stripes(sparse))
        segments = [segment for part in parts for segment in part]
    rows, raw = [], {}
    for name, item in held.items():
        dtype, shape = item.layout.dtype.name, item.layout.shape
        rows.append(
            Row(name, dtype, shape, item.kind, changed=item.changed if item.kind == "sparse" else 0, source=item.source)
        )
        if item.kind == "raw":
            raw[name] = item.cells.data.cast("B") if item.cells.size else b""
    return Patch(
        parent=patches[0].parent,
        result=patches[-1].result,
        hash=patches[0].hash,
        values=values,
        level=level,
        rows=tuple(rows),
        removed=_removed(patches, held),
        aliases=dict(patches[-1].aliases),
        segment_rows=tuple(row for row, _ in segments),
        segments=[data for _, data in segments],
        raw=raw,
    )


class _SegmentWriter:
    """Makes a stripe's segments, cut where :func:`~thinwire.sync.encode.make_patch` cuts them, and where tensors that
    are known whole begin and end."""

    def __init__(self, dtype: DType, values: str, level: str) -> None:
        self.dtype, self.values, self.level = dtype, values, level
        self.found: list[tuple[SegmentRow, bytes]] = []
        self._begin()

    def _begin(self) -> None:
        self.positions: list[npt.NDArray[np.uint32]] = []
        self.parts: list[Cells] = []
        self.cells = self.changed = 0
        self.known = False

    def add(self, block: Block, item: _Tensor) -> None:
        if self.cells and self.known != item.known:
            self.close()
        self.known = item.known
        if item.known:
            self.parts.append(item.cells[block.start : block.stop])
            self.changed += block.stop - block.start
        else:
            first, last = map(int, np.searchsorted(item.positions, [block.start, block.stop]))
            if last > first:
                self.positions.append((item.positions[first:last] - block.start + self.cells).astype(np.uint32))
                self.parts.append(item.codes[first:last])
            self.changed += last - first
        self.cells += block.stop - block.start
        if self.changed >= SEGMENT_CHANGES:
            self.close()

    def close(self) -> None:
        if not self.cells:
            return
        data = b""
        if self.known:
            data = encode_raw(self.parts)
        elif self.changed:
            changes = Changes(np.concatenate(self.positions), np.concatenate(self.parts))
            data = encode_changes(changes, self.dtype, level=self.level, values=self.values)
        self.found.append((SegmentRow(self.dtype.name, self.cells, self.changed, len(data)), data))
        self._begin()


def _stripe_segments(
    stripe: Stripe, held: Mapping[str, _Tensor], values: str, level: str
) -> list[tuple[SegmentRow, bytes]]:
    writer = _SegmentWriter(stripe.dtype, values, level)
    for block in stripe.blocks:
        writer.add(block, held[block.name])
    writer.close()
    return writer.found


def without_context(patch: Patch, base: Mapping[str, Cells], *, options: Options | None = None) -> Patch:
    """The same patch with plain gaps, so that it composes without weights; ``base`` holds the cells it starts from.

    Whether they are those is not checked here: a patch in context decodes with other weights to an error, or to
    a patch whose result is refused where it is applied.

    Raises:
        MalformedError: the patch is damaged, or does not fit the base.
        MisuseError: a part of a tensor is stored whole.
    """
    try:
        return _encoded(_decoded(patch, base), [patch], options or Options())
    except _NeedsBaseError as error:
        raise MisuseError(f"this patch cannot be told from its base: {error}") from error

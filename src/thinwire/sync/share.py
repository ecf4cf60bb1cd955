"""What one reader takes of a version in parts: its chunks, fetched by ranges where that is less, and their proof.

Objects that are fetched whole are compared with their digests. What comes by ranges cannot be; there the digests of the
chunks decide, which stand in the parts' trees: nothing is kept that does not agree with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from thinwire.errors import DamagedObjectError, MalformedError, MisuseError
from thinwire.sync.chunking import groups_for
from thinwire.sync.layout import Layout
from thinwire.sync.remote import Remote
from thinwire.sync.retrying import retrying
from thinwire.wire.chunks import Box, Chunk, ChunkMap
from thinwire.wire.container import PREFIX_BYTES, Header, header_length, parse_header
from thinwire.wire.digests import Tree
from thinwire.wire.manifest import Manifest, ObjectRef
from thinwire.wire.patch import Patch, Row, SegmentRow, parse_table, segments_entry, table_entry
from thinwire.wire.spec import HEADER_BYTES_MAX, dtype_of

__all__ = ["Meter", "Proof", "Share", "fetch_anchor", "fetch_map", "fetch_patch"]

Cells = npt.NDArray[np.unsignedinteger]
T = TypeVar("T")

WHOLE_BYTES = 64 << 10
"""Objects that are no larger are fetched whole: one request and a digest instead of two or three."""

WHOLE_SHARE = 0.75
"""And so are those of which at least this share is needed."""

_HEAD_BYTES = 16 << 10
_GAP_BYTES = 16 << 10


@dataclass(slots=True)
class Meter:
    """Bytes and requests."""

    bytes: int = 0
    requests: int = 0

    def add(self, size: int) -> None:
        self.bytes, self.requests = self.bytes + size, self.requests + 1


@dataclass(frozen=True)
class Share:
    """Some groups of the parts of a map; ``members`` are their chunks in order of their full names."""

    chunks: ChunkMap
    groups: frozenset[tuple[int, int]]
    members: tuple[Chunk, ...] = field(init=False)
    layouts: dict[str, Layout] = field(init=False)
    whole_parts: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        mine = [chunk for chunk in self.chunks.chunks() if (chunk.part, chunk.group) in self.groups]
        members = tuple(sorted(mine, key=lambda chunk: chunk.full_name))
        dtypes = {name: dtype_of(tensor.dtype) for name, tensor in self.chunks.tensors.items()}
        left = {chunk.part for chunk in self.chunks.chunks() if (chunk.part, chunk.group) not in self.groups}
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "layouts", {c.full_name: Layout(dtypes[c.tensor], c.box.sizes) for c in members})
        object.__setattr__(self, "whole_parts", frozenset(range(self.chunks.parts)) - left)

    @classmethod
    def of(cls, chunks: ChunkMap, wanted: Mapping[str, Iterable[Box]] | None) -> Share:
        """The share that holds the wanted boxes of tensors; all of the state for None. Raises MisuseError."""
        return cls(chunks, frozenset(groups_for(chunks, wanted)))

    def parts(self) -> list[int]:
        """The parts of which there is anything to fetch."""
        return sorted({part for part, _ in self.groups})

    def of_part(self, part: int) -> list[Chunk]:
        return [chunk for chunk in self.members if chunk.part == part]

    @property
    def size(self) -> int:
        """Bytes of the cells."""
        return sum(layout.size for layout in self.layouts.values())


def fetch_map(remote: Remote, manifest: Manifest) -> ChunkMap:
    """The map of chunks of a version in parts.

    Raises:
        MalformedError: it is none, or of another number of parts.
        RefetchError, RetryError: as :meth:`Remote.fetch`.
    """
    found = ChunkMap.parse(remote.fetch(manifest.tree, manifest.hash))
    if found.parts != len(manifest.parts):
        raise MalformedError(
            f"version {manifest.version} has {len(manifest.parts)} parts, its map of chunks {found.parts}: parts are "
            "missing, or of another run",
            expected=found.parts,
            actual=len(manifest.parts),
        )
    return found


class Proof:
    """Whether a tree over a share's chunks is that of a version: called with the tree.

    Of parts that are held whole the manifest's digest decides; of others their trees, which are fetched for that.
    """

    def __init__(self, remote: Remote, manifest: Manifest, share: Share, meter: Meter) -> None:
        _check_parts(manifest, share)
        self.manifest, self.share = manifest, share
        partial = [part for part in share.parts() if part not in share.whole_parts]

        def fetch(part: int) -> Tree:
            ref = manifest.parts[part].tree
            data = remote.fetch(ref, manifest.hash)
            meter.add(len(data))
            tree = Tree.parse(data)
            if tree.digest != manifest.parts[part].state:
                raise MalformedError(f"the tree of part {part} is not that of version {manifest.version}")
            return tree

        self._trees = dict(zip(partial, _side_by_side(remote, fetch, partial), strict=True))

    def __call__(self, tree: Tree) -> bool:
        return not self.flaws(tree)

    def flaws(self, tree: Tree) -> list[str]:
        """Full names of the chunks, or the parts, that are not as published."""
        found = []
        for part in self.share.parts():
            mine = {chunk.name: tree.tensors[chunk.full_name] for chunk in self.share.of_part(part)}
            published = self._trees.get(part)
            if published is not None:
                found += [f"{part:05d}/{name}" for name, info in mine.items() if published.tensors.get(name) != info]
            elif Tree(self.manifest.hash, mine, {}).digest != self.manifest.parts[part].state:
                found.append(f"{part:05d}/")
        return found


def _side_by_side(remote: Remote, work: Callable[[int], T], parts: Sequence[int]) -> list[T]:
    with ThreadPoolExecutor(max(1, min(remote.connections, len(parts)))) as pool:
        return list(pool.map(work, parts))


class _File:
    """An object read by ranges, or whole and proved where that is not more."""

    def __init__(self, remote: Remote, ref: ObjectRef, hash_name: str, meter: Meter, *, whole: bool) -> None:
        self.remote, self.ref, self.hash, self.meter = remote, ref, hash_name, meter
        self._ranged: Any = getattr(remote.store, "get_range", None)
        self._whole: memoryview | None = None
        if whole or self._ranged is None or ref.size <= WHOLE_BYTES:
            self.take_whole()
        self._head = b"" if self._whole is not None else bytes(self._ask(0, min(_HEAD_BYTES, ref.size)))

    def take_whole(self) -> None:
        if self._whole is None:
            self._whole = memoryview(self.remote.fetch(self.ref, self.hash))
            self.meter.add(len(self._whole))

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes of the file."""
        if self._whole is not None:
            return self._whole[start:stop]
        if stop <= len(self._head):
            return memoryview(self._head)[start:stop]
        return memoryview(self._ask(start, stop - start))

    def _ask(self, start: int, length: int) -> bytes:
        data: bytes = retrying(lambda: self._ranged(self.ref.key, start, length), limit_s=self.remote.retry_s)
        if len(data) != length:
            raise DamagedObjectError(f"{self.ref.key} gave {len(data)} bytes instead of {length}", key=self.ref.key)
        self.meter.add(length)
        return data

    def header(self) -> Header:
        length = header_length(bytes(self.read(0, PREFIX_BYTES)), self.ref.size)
        if length > HEADER_BYTES_MAX:
            raise MalformedError(f"a header of {length} bytes")
        return parse_header(bytes(self.read(PREFIX_BYTES, PREFIX_BYTES + length)), self.ref.size)

    def spans(self, wanted: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Several spans of bytes, in the file's order; those that lie close are asked for at once."""
        if sum(stop - start for start, stop in wanted) >= WHOLE_SHARE * self.ref.size:
            self.take_whole()
        found: list[memoryview] = []
        k = 0
        while k < len(wanted):
            last = k
            while last + 1 < len(wanted) and wanted[last + 1][0] - wanted[last][1] <= _GAP_BYTES:
                last += 1
            first = wanted[k][0]
            block = self.read(first, wanted[last][1])
            found += [block[start - first : stop - first] for start, stop in wanted[k : last + 1]]
            k = last + 1
        return found


def fetch_anchor(
    remote: Remote, manifest: Manifest, share: Share, meter: Meter, *, whole: bool = False
) -> dict[str, Cells]:
    """The cells of a share's chunks from a version's anchors, by full name. They are not proved yet.

    Raises:
        DamagedObjectError: an object has another size or digest, or lacks a chunk.
        MalformedError: a file is damaged.
        ObjectNotFoundError, RetryError: as :meth:`Remote.fetch`.
    """
    _check_parts(manifest, share)

    def fetch(part: int) -> dict[str, Cells]:
        missing = {chunk.name: chunk.full_name for chunk in share.of_part(part)}
        found: dict[str, Cells] = {}
        for ref in manifest.parts[part].anchor:
            file = _File(remote, ref, manifest.hash, meter, whole=whole or part in share.whole_parts)
            header = file.header()
            begin, entries = header.data_start, header.entries
            here = sorted((entries[name].start, entries[name].stop, name) for name in entries if name in missing)
            bodies = file.spans([(begin + start, begin + stop) for start, stop, _ in here])
            for (_, _, name), body in zip(here, bodies, strict=True):
                full, entry = missing.pop(name), entries[name]
                layout = share.layouts[full]
                if (entry.dtype, entry.shape) != (layout.dtype.name, layout.shape):
                    raise MalformedError(f"{ref.key} holds {name!r} as {entry.dtype} {entry.shape}")
                found[full] = np.frombuffer(body, layout.dtype.cells).copy() if len(body) else _empty(layout)
        if missing:
            raise DamagedObjectError(f"the anchor of part {part} lacks {next(iter(missing))!r}", part=part)
        return found

    cells: dict[str, Cells] = {}
    for found in _side_by_side(remote, fetch, share.parts()):
        cells.update(found)
    return {name: cells[name] for name in share.layouts}


def _check_parts(manifest: Manifest, share: Share) -> None:
    """Versions that name the same map of chunks have the parts that it speaks of."""
    if len(manifest.parts) != share.chunks.parts:
        raise MalformedError(
            f"version {manifest.version} has {len(manifest.parts)} parts, its map of chunks {share.chunks.parts}",
            expected=share.chunks.parts,
            actual=len(manifest.parts),
        )


def _empty(layout: Layout) -> Cells:
    """Cells of an empty tensor."""
    return np.empty(0, layout.dtype.cells)


@dataclass(slots=True)
class _Piece:
    """What is needed of one part's patch."""

    rows: list[Row]
    segment_rows: list[SegmentRow]
    segments: list[bytes | memoryview]
    values: str


def fetch_patch(
    remote: Remote, manifest: Manifest, share: Share, meter: Meter, *, parent: str, whole: bool = False
) -> Patch:
    """One patch for the chunks of a share, from those of all parts; they change by it together, or not at all.

    ``parent`` is the digest of the share's tree before. What the result must be is for a :class:`Proof` to say.

    Raises:
        MalformedError: a patch does not fit the map of chunks, or its segments reach over groups.
        DamagedObjectError, ObjectNotFoundError, RetryError: as :meth:`Remote.fetch`.
    """
    _check_parts(manifest, share)

    def fetch(part: int) -> _Piece:
        ref = manifest.parts[part].deltas[0].object
        file = _File(remote, ref, manifest.hash, meter, whole=whole or part in share.whole_parts)
        header = file.header()
        table, stored = table_entry(header), segments_entry(header)
        packed = file.read(header.data_start + table.start, header.data_start + table.stop)
        rows, segment_rows = parse_table(packed, stored.stop - stored.start)
        names = {chunk.name for chunk in share.of_part(part)}
        mine = [row for row in rows if row.name in names]
        for row in mine:
            layout = share.layouts[f"{part:05d}/{row.name}"]
            if row.kind != "sparse" or (row.dtype, row.shape) != (layout.dtype.name, layout.shape):
                raise MalformedError(f"part {part} changes {row.name!r} otherwise than its map of chunks says")
        if len(mine) != len(names):
            raise MalformedError(f"the patch of part {part} lacks chunks that its map names")
        places, kept = _needed(rows, segment_rows, names, header.data_start + stored.start)
        segments = file.spans(places)
        named = [Row(f"{part:05d}/{row.name}", row.dtype, row.shape, "sparse", row.changed) for row in mine]
        return _Piece(named, kept, list(segments), header.metadata["values"])

    pieces = _side_by_side(remote, fetch, share.parts())
    values = {piece.values for piece in pieces} or {"ulp"}
    if len(values) > 1:
        raise MisuseError("the parts of a version code their values in two ways; publish with one setting on all ranks")
    return Patch(
        parent=parent,
        result="",
        hash=manifest.hash,
        values=values.pop(),
        level="",
        rows=tuple(row for piece in pieces for row in piece.rows),
        removed=(),
        aliases={},
        segment_rows=tuple(row for piece in pieces for row in piece.segment_rows),
        segments=[data for piece in pieces for data in piece.segments],
        raw={},
    )


def _needed(
    rows: Sequence[Row], segments: Sequence[SegmentRow], names: set[str], at: int
) -> tuple[list[tuple[int, int]], list[SegmentRow]]:
    """Where the segments of the rows in ``names`` lie in the file, and their rows."""
    offsets: dict[str, int] = {}
    places: list[tuple[int, int]] = []
    kept: list[SegmentRow] = []
    wanted: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        start = offsets.get(row.dtype, 0)
        offsets[row.dtype] = start + row.cells
        if row.name in names and row.cells:
            spans = wanted.setdefault(row.dtype, [])
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, offsets[row.dtype]))
    begun: dict[str, int] = {}
    covered: dict[str, int] = {}
    for segment in segments:
        start = begun.get(segment.dtype, 0)
        stop = begun[segment.dtype] = start + segment.cells
        inside = sum(max(0, min(stop, b) - max(start, a)) for a, b in wanted.get(segment.dtype, ()))
        if inside and inside != segment.cells:
            raise MalformedError("a segment of the patch reaches from one group of chunks into another")
        if inside:
            places.append((at, at + segment.size))
            kept.append(segment)
            covered[segment.dtype] = covered.get(segment.dtype, 0) + inside
        at += segment.size
    if covered != {dtype: sum(b - a for a, b in spans) for dtype, spans in wanted.items()}:
        raise MalformedError("the segments of the patch do not hold the chunks that are wanted")
    return places, kept

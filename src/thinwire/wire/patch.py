"""A patch file: what leads from one state of a model to another, as a safetensors file.

========================  ========================================================================================
``__metadata__``          format, version, hash, values, level, parent and result state digests
``thinwire.table``        U8; zstd-compressed canonical JSON: a row per tensor, a row per segment, removed names
``thinwire.segments``     U8; the segments one after another (:mod:`thinwire.wire.segment`)
``tensors/NAME``          the whole tensor, where it is new or has another shape or data type
========================  ========================================================================================

A row's kind is ``sparse`` (its cells are part of the segments), ``raw`` (in the file) or ``moved`` (its bytes are those
of a tensor of the base with another name). The cells of all sparse tensors of one data type, in the order of their
rows, make one long vector; the segments of that data type cover it without gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import zstandard

from thinwire.errors import MalformedError, UnsupportedError
from thinwire.wire import canonical
from thinwire.wire.container import Entry, Header, header_bytes, header_length, parse_header
from thinwire.wire.digests import check_digest, check_name, check_shape, hasher
from thinwire.wire.spec import (
    FORMAT_PATCH,
    FORMAT_VERSION,
    SEGMENT_CELLS_MAX,
    SEGMENT_CHANGES_MAX,
    TABLE_BYTES_MAX,
    TENSORS_MAX,
    VALUES,
    cell_count,
    dtype_of,
)

__all__ = ["KINDS", "Patch", "Row", "SegmentRow", "parse_rows", "parse_table", "segments_entry", "table_entry"]

KINDS = ("sparse", "raw", "moved")
TABLE_KEY = "thinwire.table"
SEGMENTS_KEY = "thinwire.segments"
RAW_PREFIX = "tensors/"


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of the result: how it comes about. ``changed`` counts cells; ``source`` names the base's tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    changed: int = 0
    source: str = ""

    @property
    def cells(self) -> int:
        """Number of cells."""
        return cell_count(dtype_of(self.dtype), self.shape)

    @property
    def size(self) -> int:
        """Size of the whole tensor in bytes."""
        return self.cells * dtype_of(self.dtype).cell_bytes


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """One segment: data type, cells covered, cells changed, encoded bytes (0 if nothing changed)."""

    dtype: str
    cells: int
    changed: int
    size: int


@dataclass(frozen=True, slots=True)
class Patch:
    """A parsed or newly made patch. Buffers are views of the file's bytes; nothing is decoded yet.

    ``parent`` and ``result`` are state digests in hexadecimal. ``aliases`` are those of the result.
    """

    parent: str
    result: str
    hash: str
    values: str
    level: str
    rows: tuple[Row, ...]
    removed: tuple[str, ...]
    aliases: Mapping[str, str]
    segment_rows: tuple[SegmentRow, ...]
    segments: Sequence[bytes | memoryview]
    raw: Mapping[str, bytes | memoryview]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """Number of changed elements: changed cells of sparse tensors, all cells of raw ones."""
        return sum(row.changed if row.kind == "sparse" else row.cells for row in self.rows if row.kind != "moved")

    @property
    def cells(self) -> int:
        """Number of cells of the result."""
        return sum(row.cells for row in self.rows)

    def encode(self) -> list[bytes | memoryview]:
        """The file as consecutive buffers."""
        rows: list[list[Any]] = []
        for row in self.rows:
            extra = {"sparse": row.changed, "raw": 0, "moved": row.source}[row.kind]
            rows.append([row.name, row.dtype, list(row.shape), row.kind, extra])
        table = {
            "aliases": dict(self.aliases),
            "removed": list(self.removed),
            "segments": [[s.dtype, s.cells, s.changed, s.size] for s in self.segment_rows],
            "tensors": rows,
        }
        packed = zstandard.ZstdCompressor(level=9, write_content_size=True).compress(canonical.dump(table))
        metadata = {
            **self.metadata,
            "format": FORMAT_PATCH,
            "hash": self.hash,
            "level": self.level,
            "parent": self.parent,
            "result": self.result,
            "values": self.values,
            "version": str(FORMAT_VERSION),
        }
        length = sum(len(s) for s in self.segments)
        entries: list[tuple[str, str, tuple[int, ...], int]] = []
        raw = {row.name: row for row in self.rows if row.kind == "raw"}
        for name, row in sorted(raw.items(), key=lambda item: (-dtype_of(item[1].dtype).cell_bytes, item[0])):
            entries.append((RAW_PREFIX + name, row.dtype, row.shape, row.size))
        order = [entry[0][len(RAW_PREFIX) :] for entry in entries]
        entries += [(TABLE_KEY, "U8", (len(packed),), len(packed)), (SEGMENTS_KEY, "U8", (length,), length)]
        return [header_bytes(metadata, entries), *(self.raw[name] for name in order), packed, *self.segments]

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Patch:
        """Read a patch file. Checks all that can be checked without the base; decodes no segment.

        Raises:
            MalformedError: truncated, oversized, inconsistent.
            UnsupportedError: a newer format version, an unknown hash, value codec or data type.
        """
        view = memoryview(data).cast("B")
        length = header_length(bytes(view[:8]), len(view))
        header = parse_header(bytes(view[8 : 8 + length]), len(view))
        meta = dict(header.metadata)
        _check_format(meta)
        entries = dict(header.entries)

        def body(name: str) -> memoryview:
            entry = entries.pop(name, None)
            if entry is None or (entry.dtype != "U8" and name in (TABLE_KEY, SEGMENTS_KEY)):
                raise MalformedError(f"the patch has no valid {name!r}", name=name)
            return view[header.data_start + entry.start : header.data_start + entry.stop]

        table = _read_table(body(TABLE_KEY))
        rows = tuple(_read_row(row) for row in table["tensors"])
        names = [row.name for row in rows]
        if names != sorted(set(names)):
            raise MalformedError("the tensors of a patch are not in strictly increasing order of their names")
        removed = tuple(check_name(name) for name in table["removed"])
        if set(removed) & set(names) or len(set(removed)) != len(removed):
            raise MalformedError("a tensor is both removed and there, or removed twice")
        for alias, name in table["aliases"].items():
            if check_name(alias) in set(names) or name not in set(names):
                raise MalformedError(f"alias {alias[:80]!r} is a tensor itself or leads to none")
        stored = body(SEGMENTS_KEY)
        segment_rows = tuple(_read_segment_row(row) for row in table["segments"])
        _check_cover(rows, segment_rows, len(stored))
        segments, at = [], 0
        for segment in segment_rows:
            segments.append(stored[at : at + segment.size])
            at += segment.size
        raw = {row.name: _raw_body(row, entries, body) for row in rows if row.kind == "raw"}
        if entries:
            raise MalformedError(f"the patch holds tensors that its table does not name: {sorted(entries)[:3]}")
        known = {"format", "hash", "level", "parent", "result", "values", "version"}
        return cls(
            parent=check_digest(meta.get("parent")),
            result=check_digest(meta.get("result")),
            hash=meta["hash"],
            values=meta["values"],
            level=meta.get("level", ""),
            rows=rows,
            removed=removed,
            aliases=table["aliases"],
            segment_rows=segment_rows,
            segments=segments,
            raw=raw,
            metadata={k: v for k, v in meta.items() if k not in known},
        )


def table_entry(header: Header) -> Entry:
    """Where a patch file's table lies, for who reads it without the rest of the file.

    Raises:
        MalformedError, UnsupportedError: as :meth:`Patch.parse`.
    """
    _check_format(header.metadata)
    entry = header.entries.get(TABLE_KEY)
    if entry is None or entry.dtype != "U8":
        raise MalformedError(f"the patch has no valid {TABLE_KEY!r}", name=TABLE_KEY)
    return entry


def segments_entry(header: Header) -> Entry:
    """Where a patch file's segments lie, one after another. Raises MalformedError."""
    entry = header.entries.get(SEGMENTS_KEY)
    if entry is None or entry.dtype != "U8":
        raise MalformedError(f"the patch has no valid {SEGMENTS_KEY!r}", name=SEGMENTS_KEY)
    return entry


def parse_table(packed: bytes | memoryview, stored_bytes: int) -> tuple[tuple[Row, ...], tuple[SegmentRow, ...]]:
    """The rows of tensors and of segments in a table, for who reads the segments (``stored_bytes`` of them) by ranges.

    Raises:
        MalformedError: as :meth:`Patch.parse`.
    """
    table = _read_table(memoryview(packed))
    rows = tuple(_read_row(row) for row in table["tensors"])
    segments = tuple(_read_segment_row(row) for row in table["segments"])
    _check_cover(rows, segments, stored_bytes)
    return rows, segments


def parse_rows(packed: bytes | memoryview) -> tuple[Row, ...]:
    """The tensors' rows of a table alone; that the segments agree with them is not looked at.

    Raises:
        MalformedError: as :meth:`Patch.parse`.
    """
    return tuple(_read_row(row) for row in _read_table(memoryview(packed))["tensors"])


def _check_format(meta: Mapping[str, str]) -> None:
    if meta.get("format") != FORMAT_PATCH:
        raise MalformedError("not a thinwire patch: its metadata name no format 'thinwire.patch'")
    if meta.get("version") != str(FORMAT_VERSION):
        raise UnsupportedError(
            f"patch format version {str(meta.get('version'))[:20]!r}, known is {FORMAT_VERSION}; upgrade thinwire"
        )
    hasher(meta.get("hash", ""))
    if meta.get("values") not in VALUES:
        raise UnsupportedError(f"unknown value codec {str(meta.get('values'))[:40]!r}; upgrade thinwire")


def _read_table(packed: memoryview) -> dict[str, Any]:
    try:
        size = zstandard.get_frame_parameters(packed).content_size
        if size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR) or size > TABLE_BYTES_MAX:
            raise MalformedError(f"the table claims {size} bytes, at most {TABLE_BYTES_MAX} are accepted", bytes=size)
        text = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MalformedError(f"the table is damaged: {error}") from error
    table = canonical.parse(text, bytes_max=TABLE_BYTES_MAX)
    lists = ("removed", "segments", "tensors")
    if not isinstance(table, dict) or not all(isinstance(table.get(k), list) for k in lists):
        raise MalformedError(f"the table lacks one of {', '.join(lists)}")
    if not isinstance(table.get("aliases"), dict) or any(len(table[k]) > TENSORS_MAX for k in lists):
        raise MalformedError("the table has no aliases, or too many rows")
    return table


def _read_row(value: Any) -> Row:
    if not isinstance(value, list) or len(value) != 5 or value[3] not in KINDS:
        raise MalformedError(f"not a tensor's row: {str(value)[:80]}")
    name, shape, dtype = check_name(value[0]), check_shape(value[2]), dtype_of(value[1])
    cells = cell_count(dtype, shape)
    kind, extra = value[3], value[4]
    if kind == "moved":
        return Row(name, dtype.name, shape, kind, source=check_name(extra))
    if type(extra) is not int or not 0 <= extra <= cells:
        raise MalformedError(f"{str(extra)[:20]} changes in the {cells} cells of {name[:80]!r}")
    return Row(name, dtype.name, shape, kind, changed=extra)


def _read_segment_row(value: Any) -> SegmentRow:
    if not isinstance(value, list) or len(value) != 4 or not all(type(n) is int and n >= 0 for n in value[1:]):
        raise MalformedError(f"not a segment's row: {str(value)[:80]}")
    row = SegmentRow(dtype_of(value[0]).name, *value[1:])
    if not 0 < row.cells <= SEGMENT_CELLS_MAX or row.changed > min(row.cells, SEGMENT_CHANGES_MAX):
        raise MalformedError(f"a segment of {row.cells} cells with {row.changed} changes is beyond the bounds")
    if (row.size == 0) != (row.changed == 0):
        raise MalformedError(f"a segment of {row.size} bytes holds {row.changed} changes")
    return row


def _check_cover(rows: Sequence[Row], segments: Sequence[SegmentRow], stored_bytes: int) -> None:
    def totals(items: Sequence[Any]) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for item in items:
            cells, changed = found.get(item.dtype, (0, 0))
            found[item.dtype] = (cells + item.cells, changed + item.changed)
        return {k: v for k, v in found.items() if v[0]}

    if totals([row for row in rows if row.kind == "sparse"]) != totals(segments):
        raise MalformedError("the segments do not cover the sparse tensors exactly")
    if sum(segment.size for segment in segments) != stored_bytes:
        raise MalformedError(f"the segments' sizes do not add up to the {stored_bytes} bytes stored")


def _raw_body(row: Row, entries: dict[str, Entry], body: Any) -> memoryview:
    entry = entries.get(RAW_PREFIX + row.name)
    if entry is None or (entry.dtype, entry.shape) != (row.dtype, row.shape):
        raise MalformedError(f"tensor {row.name[:80]!r} is not in the patch as its row describes it")
    found: memoryview = body(RAW_PREFIX + row.name)
    return found

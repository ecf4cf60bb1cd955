"""A segment: the changes of up to 2^26 consecutive cells of one data type, whatever tensors they belong to.

Streams are pooled over tensors, because every stream pays for its tables. Segments are independent of each other, so
that all cores encode and decode at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thinwire.errors import MalformedError, UnsupportedError
from thinwire.wire import packed, rans
from thinwire.wire.context import COLD, ContextReader
from thinwire.wire.cursor import Cursor, put_varint
from thinwire.wire.positions import gaps_of, positions_of
from thinwire.wire.spec import CLASSES_MAX, CODEC_CONTEXT, CODEC_GAPS, CODEC_PACKED, CODEC_RAW, DType
from thinwire.wire.values import rotate_left, rotate_right

__all__ = ["Changes", "decode_segment", "encode_context", "encode_gaps", "encode_packed", "encode_raw"]

Cells = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class Changes:
    """Sparse changes of a segment: strictly increasing ``positions`` (uint32) and their ``codes`` (cells).

    Codes are zigzag steps (``ulp``) or new cells (``absolute``).
    """

    positions: npt.NDArray[np.uint32]
    codes: Cells


def _stream(cursor: Cursor, count: int, dtype: npt.DTypeLike) -> npt.NDArray[np.unsignedinteger]:
    length = cursor.varint(rans.encoded_size_max(count, np.dtype(dtype).itemsize))
    return rans.decode(cursor.take(length), count, dtype)


def _packed(cursor: Cursor, count: int, dtype: npt.DTypeLike) -> npt.NDArray[np.unsignedinteger]:
    length = cursor.varint(packed.encoded_size_max(count, np.dtype(dtype).itemsize))
    return packed.decode(cursor.take(length), count, dtype)


def _put_stream(out: bytearray, values: npt.NDArray[np.unsignedinteger], effort: int) -> None:
    data = rans.encode(values, effort)
    put_varint(out, len(data))
    out += data


def _stored(codes: Cells, dtype: DType, values: str) -> Cells:
    return rotate_left(codes, is_float=dtype.is_float) if values == "absolute" else codes


def encode_raw(cells: Sequence[Cells]) -> bytes:
    """All cells of the segment as they are, for changes so dense that a list of them would be larger."""
    return bytes([CODEC_RAW]) + b"".join(c.tobytes() for c in cells)


def encode_gaps(changes: Changes, dtype: DType, *, values: str, effort: int) -> bytes:
    """Plain gaps over all cells of the segment; readable without the base."""
    out = bytearray([CODEC_GAPS])
    _put_stream(out, gaps_of(changes.positions, 0), effort)
    _put_stream(out, _stored(changes.codes, dtype, values), effort)
    return bytes(out)


def encode_packed(changes: Changes, dtype: DType, *, values: str) -> bytes:
    """Plain gaps and codes in whole bytes, without entropy coding; readable without the base."""
    out = bytearray([CODEC_PACKED])
    for stream in (gaps_of(changes.positions, 0), _stored(changes.codes, dtype, values)):
        data = packed.encode(stream)
        put_varint(out, len(data))
        out += data
    return bytes(out)


def encode_context(
    codes: Cells,
    classes: npt.NDArray[np.uint8],
    gaps: npt.NDArray[np.uint32],
    bounds: tuple[int, ...],
    dtype: DType,
    *,
    values: str,
    effort: int,
) -> bytes:
    """Classes and gaps as a :class:`~thinwire.wire.context.ContextWriter` made them."""
    out = bytearray([CODEC_CONTEXT])
    put_varint(out, len(bounds))
    for bound in bounds:
        put_varint(out, bound)
    stored = _stored(codes, dtype, values)
    members = [np.flatnonzero(classes == k) for k in (*range(len(bounds)), COLD)]
    for member in members:
        put_varint(out, member.size)
    for member in members:
        _put_stream(out, gaps[member], effort)
        _put_stream(out, stored[member], effort)
    return bytes(out)


def _decode_context(cursor: Cursor, cells: int, changed: int, dtype: DType, base: Sequence[Cells]) -> Changes:
    if not dtype.is_float:
        raise MalformedError(f"context coding is for floats, not {dtype.name}")
    classes = cursor.varint(CLASSES_MAX)
    bounds = tuple(cursor.varint(1 << dtype.exponent_bits) for _ in range(classes))
    counts = [cursor.varint(changed) for _ in range(classes + 1)]
    if sum(counts) != changed:
        raise MalformedError(f"the classes of a segment hold {sum(counts)} changes instead of {changed}")
    gaps, codes = [], []
    for count in counts:
        gaps.append(_stream(cursor, count, np.uint32))
        codes.append(_stream(cursor, count, dtype.cells))
    cold = positions_of(gaps[-1], 0, cells)
    reader = ContextReader(dtype, bounds, gaps[:-1], codes[:-1], cold, codes[-1])
    offset = 0
    for piece in base:
        reader.add(piece, offset)
        offset += piece.size
    reader.finish()
    return Changes(reader.positions, reader.codes)


def decode_segment(
    data: memoryview, dtype: DType, *, cells: int, changed: int, values: str, base: Sequence[Cells]
) -> Changes | Cells:
    """The changes of a segment, or all its new cells if it was stored raw.

    ``cells`` and ``changed`` come from the patch's table and were checked against the base there. ``base`` holds the
    segment's old cells in consecutive 1-d pieces; only context-coded segments read it.

    Raises:
        MalformedError: the bytes are damaged, or do not fit the base.
        UnsupportedError: an unknown codec.
    """
    cursor = Cursor(data, "a segment")
    codec = cursor.take(1)[0]
    if codec == CODEC_RAW:
        raw = np.frombuffer(cursor.take(cells * dtype.cell_bytes), dtype.cells)
        changes: Changes | Cells = raw
    elif codec == CODEC_GAPS:
        gaps = _stream(cursor, changed, np.uint32)
        positions = positions_of(gaps, 0, cells)
        changes = Changes(positions, _stream(cursor, changed, dtype.cells))
    elif codec == CODEC_PACKED:
        positions = positions_of(_packed(cursor, changed, np.uint32), 0, cells)
        changes = Changes(positions, _packed(cursor, changed, dtype.cells))
    elif codec == CODEC_CONTEXT:
        changes = _decode_context(cursor, cells, changed, dtype, base)
    else:
        raise UnsupportedError(f"segment codec {codec} is unknown; upgrade thinwire", codec=codec)
    if cursor.at != len(data):
        raise MalformedError(f"a segment has {len(data) - cursor.at} bytes too many")
    if values == "absolute" and isinstance(changes, Changes):
        return Changes(changes.positions, rotate_right(changes.codes, is_float=dtype.is_float))
    return changes

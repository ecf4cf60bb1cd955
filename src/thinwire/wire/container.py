"""The safetensors container, read as hostile input and written without joining its parts in memory.

A file is: header length (u64, little-endian), header (JSON), tensor bytes. Unlike general readers this one requires
that the tensors fill the data without gaps or overlaps, in any order, as the format's specification demands.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinwire.errors import MalformedError
from thinwire.wire import canonical
from thinwire.wire.digests import check_name, check_shape
from thinwire.wire.spec import HEADER_BYTES_MAX, TENSORS_MAX, cell_count, dtype_of

__all__ = ["Entry", "Header", "header_bytes", "header_length", "parse_header"]

PREFIX_BYTES = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: dtype, shape, and where its bytes lie behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header. ``data_start`` is the offset of the first tensor byte in the file."""

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    data_start: int
    file_bytes: int


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Length of the header from a file's first 8 bytes.

    Raises:
        MalformedError: the file is shorter than it says, or the header is beyond the bound.
    """
    if len(prefix) < PREFIX_BYTES:
        raise MalformedError(f"a safetensors file has at least 8 bytes, this one has {len(prefix)}")
    (length,) = struct.unpack("<Q", prefix[:PREFIX_BYTES])
    if length > HEADER_BYTES_MAX or PREFIX_BYTES + length > file_bytes:
        raise MalformedError(
            f"the header claims {length} bytes, the file has {file_bytes}", claimed=length, bytes=file_bytes
        )
    return int(length)


def _entry(name: str, value: Any, data_bytes: int) -> Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= set(value):
        raise MalformedError(f"tensor {name[:80]!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = dtype_of(value["dtype"]), check_shape(value["shape"]), value["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise MalformedError(f"tensor {name[:80]!r} has no valid data_offsets")
    start, stop = offsets
    if not 0 <= start <= stop <= data_bytes or stop - start != cell_count(dtype, shape) * dtype.cell_bytes:
        raise MalformedError(
            f"tensor {name[:80]!r} of {dtype.name} {shape} cannot lie in bytes {start} to {stop} of {data_bytes}"
        )
    return Entry(dtype.name, shape, start, stop)


def parse_header(header: bytes, file_bytes: int) -> Header:
    """Parse a header (without its 8 bytes of length) of a file of ``file_bytes``.

    Raises:
        MalformedError: anything that does not follow the format.
        UnsupportedError: an unknown data type.
    """
    value = canonical.parse(header.rstrip(b" "), bytes_max=HEADER_BYTES_MAX, canonical=False)
    if not isinstance(value, dict) or len(value) > TENSORS_MAX:
        raise MalformedError("the header is not an object, or names too many tensors")
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedError("the header's metadata are not strings")
    data_start = PREFIX_BYTES + len(header)
    entries = {check_name(name): _entry(name, entry, file_bytes - data_start) for name, entry in value.items()}
    end = 0
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != end:
            raise MalformedError(f"tensor bytes overlap or leave a gap at byte {end}", offset=end)
        end = entry.stop
    if data_start + end != file_bytes:
        raise MalformedError(
            f"the tensors end at byte {data_start + end}, the file at {file_bytes}", expected=data_start + end
        )
    return Header(metadata, entries, data_start, file_bytes)


def header_bytes(metadata: Mapping[str, str], tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The start of a file up to the first tensor byte; ``tensors`` are (name, dtype, shape, bytes) in their order.

    Padded with blanks to a multiple of 8, so that tensors are aligned when the file is mapped.
    """
    value: dict[str, Any] = {}
    if metadata:
        value["__metadata__"] = dict(metadata)
    at = 0
    for name, dtype, shape, size in tensors:
        value[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(value, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text

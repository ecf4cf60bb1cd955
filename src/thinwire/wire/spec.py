"""The numbers of the format: versions, bounds, codec ids, data types. Nothing here may change within a version."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from thinwire.errors import MalformedError, UnsupportedError

__all__ = [
    "CODEC_CONTEXT",
    "CODEC_GAPS",
    "CODEC_PACKED",
    "CODEC_RAW",
    "DTYPES",
    "FORMAT_PATCH",
    "FORMAT_VERSION",
    "DType",
    "cell_count",
    "dtype_of",
]

if sys.byteorder != "little":  # pragma: no cover - the format is little-endian and the kernels copy bytes as they are
    raise UnsupportedError("thinwire runs on little-endian machines only")

FORMAT_PATCH = "thinwire.patch"
FORMAT_VERSION = 1

# Bounds, checked before anything is allocated for what they bound.
HEADER_BYTES_MAX = 64 << 20
TABLE_BYTES_MAX = 64 << 20  # of the decompressed table
MANIFEST_BYTES_MAX = 16 << 20
JSON_DEPTH_MAX = 16
TENSORS_MAX = 1 << 20
NAME_BYTES_MAX = 1024
DIMENSIONS_MAX = 32
CELLS_MAX = 1 << 48
SEGMENT_CELLS_MAX = 1 << 26
SEGMENT_CHANGES_MAX = 1 << 22
CLASSES_MAX = 64
DIGEST_BYTES = 32

CODEC_RAW = 0
CODEC_GAPS = 1
CODEC_CONTEXT = 2
CODEC_PACKED = 3
CODEC_NAMES = {CODEC_RAW: "raw", CODEC_GAPS: "gaps", CODEC_CONTEXT: "context", CODEC_PACKED: "packed"}

VALUES = ("ulp", "absolute")
HASHES = ("blake3", "sha256")


@dataclass(frozen=True, slots=True)
class DType:
    """How the elements of a safetensors data type are seen: as *cells*, unsigned integers of 1, 2, 4 or 8 bytes.

    ``cell_bytes`` is the width of a cell, ``element_bits`` that of an element: a C64 element is two cells, an F4
    element half of one. ``exponent_bits`` is 0 where cells are not sign-magnitude floats (integers, bool, packed
    types).
    """

    name: str
    cell_bytes: int
    element_bits: int
    exponent_bits: int = 0

    @property
    def cells(self) -> np.dtype[np.unsignedinteger]:
        """NumPy data type of a cell."""
        return np.dtype(f"u{self.cell_bytes}")

    @property
    def is_float(self) -> bool:
        """Whether cells order like sign-magnitude numbers."""
        return self.exponent_bits > 0

    @property
    def mantissa_bits(self) -> int:
        """Bits below the exponent."""
        return self.cell_bytes * 8 - 1 - self.exponent_bits


DTYPES = {
    d.name: d
    for d in (
        DType("BOOL", 1, 8),
        DType("U8", 1, 8),
        DType("I8", 1, 8),
        DType("U16", 2, 16),
        DType("I16", 2, 16),
        DType("U32", 4, 32),
        DType("I32", 4, 32),
        DType("U64", 8, 64),
        DType("I64", 8, 64),
        DType("F4", 1, 4),
        DType("F8_E4M3", 1, 8, 4),
        DType("F8_E5M2", 1, 8, 5),
        DType("F8_E4M3FNUZ", 1, 8, 4),
        DType("F8_E5M2FNUZ", 1, 8, 5),
        DType("F8_E8M0", 1, 8),
        DType("F16", 2, 16, 5),
        DType("BF16", 2, 16, 8),
        DType("F32", 4, 32, 8),
        DType("F64", 8, 64, 11),
        DType("C64", 4, 64, 8),
    )
}


def dtype_of(name: object) -> DType:
    """The data type called ``name`` in safetensors.

    Raises:
        UnsupportedError: there is none.
    """
    if not isinstance(name, str) or name not in DTYPES:
        raise UnsupportedError(f"unknown data type {str(name)[:40]!r}; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def cell_count(dtype: DType, shape: tuple[int, ...]) -> int:
    """Number of cells of a tensor.

    Raises:
        MalformedError: too large, or not a whole number of cells.
    """
    elements = 1
    for size in shape:
        elements *= size
        if elements > CELLS_MAX:
            raise MalformedError(f"a tensor of shape {shape[:8]} is beyond the format's bound", shape=shape[:8])
    bits = elements * dtype.element_bits
    if bits % (8 * dtype.cell_bytes):
        raise MalformedError(f"{elements} elements of {dtype.name} do not fill whole bytes", shape=shape)
    return bits // (8 * dtype.cell_bytes)

"""Unsigned integers in as few whole bytes each as suits most of them; the others are listed behind.

No entropy coding: two to three times the bytes of :mod:`thinwire.wire.rans`, at the speed of memory, for links that are
faster than any coder. Source: the patching of Zukowski et al., "Super-Scalar RAM-CPU Cache Compression" (ICDE 2006).

>>> data = encode(np.array([3, 1, 70_000], np.uint32))
>>> data[0], len(data), decode(memoryview(data), 3, np.uint32).tolist()
(1, 13, [3, 1, 70000])
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thinwire.errors import MalformedError
from thinwire.wire.cursor import Cursor, put_varint

__all__ = ["decode", "encode", "encoded_size_max"]

Integers = npt.NDArray[np.unsignedinteger]


def encoded_size_max(count: int, itemsize: int) -> int:
    """Bytes that ``count`` integers of ``itemsize`` bytes take at most."""
    return 6 + count * itemsize


def encode(values: Integers) -> bytes:
    """Width, number of exceptions, low bytes, exceptions' indices and values; of at most 2^32 ``values`` (1-d)."""
    item, count = values.itemsize, values.size
    best, cost, beyond = item, count * item, np.empty(0, np.intp)
    for width in (1, 2, 4):
        if width >= item or count * width >= cost:
            break
        large = values > values.dtype.type((1 << 8 * width) - 1)
        size = count * width + int(np.count_nonzero(large)) * (4 + item)
        if size < cost:
            best, cost, beyond = width, size, np.flatnonzero(large)
            if not beyond.size:
                break
    out = bytearray([best])
    put_varint(out, beyond.size)
    out += values.astype(f"<u{best}").data.cast("B") if count else b""
    return bytes(out) + beyond.astype("<u4").tobytes() + values[beyond].astype(f"<u{item}").tobytes()


def decode(data: memoryview, count: int, dtype: npt.DTypeLike) -> Integers:
    """The inverse of :func:`encode`: ``count`` integers of ``dtype`` from all of ``data``.

    Raises:
        MalformedError: the bytes are not what :func:`encode` writes.
    """
    item = np.dtype(dtype).itemsize
    cursor = Cursor(data, "packed integers")
    width = cursor.take(1)[0]
    if width not in (1, 2, 4, 8) or width > item:
        raise MalformedError(f"integers of {item} bytes packed into {width}", width=width)
    exceptions = cursor.varint(count if width < item else 0)
    values = np.frombuffer(cursor.take(count * width), f"<u{width}").astype(dtype)
    at = np.frombuffer(cursor.take(4 * exceptions), "<u4")
    beyond = np.frombuffer(cursor.take(item * exceptions), f"<u{item}")
    if cursor.at != len(data):
        raise MalformedError(f"packed integers have {len(data) - cursor.at} bytes too many")
    if exceptions:
        mask = (1 << 8 * width) - 1
        ordered = bool((at[1:] > at[:-1]).all()) and int(at[-1]) < count
        if not ordered or not ((beyond > mask) & ((beyond & beyond.dtype.type(mask)) == values[at])).all():
            raise MalformedError("exceptions of packed integers are out of order or do not fit")
        values[at] = beyond
    return values

"""Where the cells of a chunk lie in the tensor that it is a box of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thinwire.errors import MalformedError
from thinwire.wire.chunks import Box
from thinwire.wire.spec import DType

__all__ = ["places_in"]


def places_in(
    box: Box, shape: tuple[int, ...], dtype: DType, positions: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """Flat cell positions in a tensor of ``shape`` for flat cell ``positions`` in its ``box``, of any dimensions.

    Cells are those of ``dtype``: a C64 element is two of them.

    Raises:
        MalformedError: a type that packs elements into a byte (F4) is cut.

    >>> from thinwire.wire.spec import dtype_of
    >>> middle = Box(offsets=(1, 2), sizes=(2, 3))  # of a matrix of 4 rows and 10 columns
    >>> places_in(middle, (4, 10), dtype_of("BF16"), np.array([0, 2, 3, 5])).tolist()
    [12, 14, 22, 24]
    """
    flat = np.asarray(positions, np.int64)
    if box.sizes == shape:
        return flat.copy()
    bits = 8 * dtype.cell_bytes
    if dtype.element_bits % bits:
        raise MalformedError(f"{dtype.name} holds two elements in a byte and cannot be cut, as {box} of {shape} is")
    found, rest, stride = np.zeros_like(flat), flat, 1
    for offset, size, whole in _merged(box, shape, dtype.element_bits // bits):
        rest, index = np.divmod(rest, size)
        found += (index + offset) * stride
        stride *= whole
    return found


def _merged(box: Box, shape: tuple[int, ...], width: int) -> list[tuple[int, int, int]]:
    """Offset, size and whole size by dimension, the last one first; those that are not cut are taken together with the
    one before them, so that rows are one dimension and columns are two."""
    found, offset, size, whole = [], 0, width, width
    for first, length, of in zip(reversed(box.offsets), reversed(box.sizes), reversed(shape), strict=True):
        if size != whole:
            found.append((offset, size, whole))
            offset, size, whole = first, length, of
        else:
            offset, size, whole = first * whole, length * whole, of * whole
    return [*found, (offset, size, whole)]

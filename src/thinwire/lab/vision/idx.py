"""IDX files, as MNIST is distributed: a small header and big-endian bytes, gzipped.

Layout (LeCun, Cortes & Burges, http://yann.lecun.com/exdb/mnist/): two zero bytes, the type (8: uint8), the number of
dimensions, each dimension as uint32, then the values in C order.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thinwire.errors import MalformedError

__all__ = ["read_idx"]

_UINT8 = 8
_DIMENSIONS_MAX = 4
_BYTES_MAX = 1 << 31


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array in a gzipped IDX file of uint8.

    Nothing is allocated beyond what the header says, and that is bounded by 2 GiB; a file that expands to more or less
    than that is refused.

    Raises:
        MalformedError: the file is not gzip, not IDX of uint8, too large, truncated, or has bytes behind its end.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "labels.gz"
    ...     _ = path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1])))
    ...     read_idx(path)
    array([7, 2, 1], dtype=uint8)
    """
    try:
        with gzip.open(path, "rb") as file:
            return _read(file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MalformedError(f"{path} is no whole gzip file: {error}; get it again", path=str(path)) from error


def _read(file: Any, path: Path) -> npt.NDArray[np.uint8]:
    magic = file.read(4)
    if len(magic) != 4 or magic[:2] != b"\0\0" or magic[2] != _UINT8 or not 1 <= magic[3] <= _DIMENSIONS_MAX:
        raise MalformedError(f"{path} is no IDX file of uint8: it begins with {magic.hex()}", path=str(path))
    header = file.read(4 * magic[3])
    if len(header) != 4 * magic[3]:
        raise MalformedError(f"{path} ends within its header; get it again", path=str(path))
    shape = struct.unpack(f">{magic[3]}I", header)
    size = prod(shape)
    if size > _BYTES_MAX:
        raise MalformedError(f"{path} says it holds {size} bytes; at most {_BYTES_MAX} are read", path=str(path))
    data = file.read(size + 1)
    if len(data) != size:
        raise MalformedError(f"{path} holds {len(data)} values or more where {size} are due", path=str(path))
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)

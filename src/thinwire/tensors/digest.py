"""Digests of tensors: hashing of blocks, on as many threads as the caller runs (the hashes release the GIL)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thinwire.wire.digests import BLOCK_BYTES, TensorInfo, hasher, tensor_digest
from thinwire.wire.spec import dtype_of

__all__ = ["block_cells", "block_count", "digest_cells", "hash_block"]

Cells = npt.NDArray[np.unsignedinteger]


def block_cells(cell_bytes: int) -> int:
    """Cells in one block of :data:`~thinwire.wire.digests.BLOCK_BYTES`."""
    return BLOCK_BYTES // cell_bytes


def block_count(cells: int, cell_bytes: int) -> int:
    """Blocks of a tensor; an empty tensor has none."""
    return -(-cells // block_cells(cell_bytes))


def hash_block(hash_name: str, cells: Cells) -> bytes:
    """Digest of one block: contiguous cells."""
    return hasher(hash_name)(cells.data.cast("B") if cells.size else b"").digest()


def digest_cells(hash_name: str, dtype: str, shape: tuple[int, ...], cells: Cells) -> TensorInfo:
    """Digest of a whole tensor, given as 1-d cells."""
    step = block_cells(dtype_of(dtype).cell_bytes)
    leaves = [hash_block(hash_name, cells[i : i + step]) for i in range(0, cells.size, step)]
    return TensorInfo(dtype, shape, tensor_digest(hash_name, dtype, shape, leaves))

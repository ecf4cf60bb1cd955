"""What others send instead, written as well as their formats allow, to be measured beside thinwire.

None computes a digest of the result, as thinwire does. All run on the same threads: over tensors where the original
works by tensor, over stripes of 2^25 cells where it pools them. The diff is thinwire's own kernel, which runs at memory
speed, so that what differs is the format.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import zstandard

from thinwire.bench.kernels import scatter, scatter_xor, short_gaps
from thinwire.bench.weights import STRIPE, Cells, parts_of
from thinwire.tensors.kernels import find_changed
from thinwire.wire.positions import gaps_of, positions_of
from thinwire.wire.values import apply_steps

__all__ = ["PATCH_FROM", "PEERS", "Peer", "apply_all", "encode_all", "units_of"]

PIECE = 1 << 23
_CACHED = 1 << 19  # cells that pass through the cache at once


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to send a new version to someone who holds the old one.

    ``encode(old, new)`` gives the bytes for one unit, ``apply(data, cells)`` turns the old cells into the new ones in
    place. ``unit`` is what they are called with (a piece is 16 MiB). ``note`` says whose format it is.
    """

    name: str
    unit: Literal["tensor", "stripe", "piece"]
    encode: Callable[[Cells, Cells], bytes]
    apply: Callable[[bytes, Cells], None]
    note: str


def units_of(peer: Peer, flat: Cells, shapes: Mapping[str, tuple[int, ...]]) -> list[Cells]:
    """Views of what the peer is called with, one after another."""
    if peer.unit == "tensor":
        return list(parts_of(flat, shapes).values())
    step = STRIPE if peer.unit == "stripe" else PIECE
    return [flat[at : at + step] for at in range(0, flat.size, step)]


def encode_all(peer: Peer, old: Sequence[Cells], new: Sequence[Cells], pool: ThreadPoolExecutor) -> list[bytes]:
    """All units of a state, encoded on the pool's threads."""
    return list(pool.map(peer.encode, old, new))


def apply_all(peer: Peer, data: Sequence[bytes], cells: Sequence[Cells], pool: ThreadPoolExecutor) -> None:
    """Turn all units of a state into the new version."""
    list(pool.map(peer.apply, data, cells))


# --- shared parts --------------------------------------------------------------------------------------------------


def _changes(old: Cells, new: Cells, values: str) -> tuple[npt.NDArray[np.uint32], Cells]:
    """Positions of the changed cells, and the new cells (``absolute``) or zigzag steps (``ulp``)."""
    positions, codes = np.empty(old.size, np.uint32), np.empty(old.size, np.uint16)
    found = find_changed(old, new, 0, positions, codes, 0, is_float=True, values=values)
    return positions[:found], codes[:found]


def _frame(first: bytes, second: bytes) -> bytes:
    return struct.pack("<Q", len(first)) + first + second


def _unframe(data: bytes) -> tuple[memoryview, memoryview]:
    view = memoryview(data)
    cut = 8 + int(struct.unpack_from("<Q", view)[0])
    return view[8:cut], view[cut:]


def _squeeze(data: bytes | memoryview) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def _stretch(data: bytes | memoryview) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


# --- whole tensors -------------------------------------------------------------------------------------------------


def _copy_encode(_old: Cells, new: Cells) -> bytes:
    return new.tobytes()


def _copy_apply(data: bytes, cells: Cells) -> None:
    cells[:] = np.frombuffer(data, np.uint16)


def _zstd_encode(_old: Cells, new: Cells) -> bytes:
    return _squeeze(new.data.cast("B"))


def _zstd_apply(data: bytes, cells: Cells) -> None:
    cells[:] = np.frombuffer(_stretch(data), np.uint16)


def _xor_encode(old: Cells, new: Cells) -> bytes:
    """XOR piece by piece, so that the difference never leaves the cache."""
    stream = zstandard.ZstdCompressor(level=1).compressobj(size=new.nbytes)
    scratch = np.empty(min(_CACHED, new.size), np.uint16)
    parts = []
    for at in range(0, new.size, _CACHED):
        piece = scratch[: min(_CACHED, new.size - at)]
        np.bitwise_xor(old[at : at + _CACHED], new[at : at + _CACHED], out=piece)
        parts.append(stream.compress(piece.data.cast("B")))
    return b"".join([*parts, stream.flush()])


def _xor_apply(data: bytes, cells: Cells) -> None:
    scratch = np.empty(min(_CACHED, cells.size), np.uint16)
    with zstandard.ZstdDecompressor().stream_reader(data) as reader:
        for at in range(0, cells.size, _CACHED):
            piece = scratch[: min(_CACHED, cells.size - at)]
            view, got = piece.data.cast("B"), 0
            while got < len(view):
                got += reader.readinto(view[got:])
            cells[at : at + _CACHED] ^= piece


# --- changed cells only --------------------------------------------------------------------------------------------


def _coo_encode(old: Cells, new: Cells) -> bytes:
    positions, values = _changes(old, new, "absolute")
    return positions.tobytes() + values.tobytes()


def _coo_apply(data: bytes, cells: Cells) -> None:
    count = len(data) // 6
    scatter(cells, np.frombuffer(data, np.uint32, count), np.frombuffer(data, np.uint16, count, 4 * count))


def _coo_zstd_encode(old: Cells, new: Cells) -> bytes:
    positions, values = _changes(old, new, "absolute")
    return _frame(_squeeze(positions.tobytes()), _squeeze(values.tobytes()))


def _coo_zstd_apply(data: bytes, cells: Cells) -> None:
    positions, values = (_stretch(part) for part in _unframe(data))
    scatter(cells, np.frombuffer(positions, np.uint32), np.frombuffer(values, np.uint16))


def _gaps_zstd_encode(old: Cells, new: Cells) -> bytes:
    positions, values = _changes(old, new, "absolute")
    return _frame(_squeeze(gaps_of(positions, 0).tobytes()), _squeeze(values.tobytes()))


def _gaps_zstd_apply(data: bytes, cells: Cells) -> None:
    gaps, values = (_stretch(part) for part in _unframe(data))
    positions = positions_of(np.frombuffer(gaps, np.uint32), 0, cells.size)
    scatter(cells, positions, np.frombuffer(values, np.uint16))


def _short_encode(old: Cells, new: Cells) -> bytes:
    positions, values = _changes(old, new, "absolute")
    room = positions.size + (old.size >> 16) + 1
    gaps, xors = np.empty(room, np.uint16), np.empty(room, np.uint16)
    count = short_gaps(positions, values, old, gaps, xors)
    return _frame(_squeeze(gaps[:count].tobytes()), _squeeze(xors[:count].tobytes()))


def _short_apply(data: bytes, cells: Cells) -> None:
    gaps, xors = (np.frombuffer(_stretch(part), np.uint16) for part in _unframe(data))
    scatter_xor(cells, gaps, xors)


def _pcodec_encode(old: Cells, new: Cells) -> bytes:
    from pcodec import ChunkConfig, standalone

    positions, codes = _changes(old, new, "ulp")
    config = ChunkConfig(compression_level=8)
    return _frame(standalone.simple_compress(gaps_of(positions, 0), config), standalone.simple_compress(codes, config))


def _pcodec_apply(data: bytes, cells: Cells) -> None:
    from pcodec import standalone

    gaps, codes = (standalone.simple_decompress(bytes(part)) for part in _unframe(data))
    if gaps is None or codes is None:  # how pcodec reads back an empty array
        return
    positions = positions_of(gaps, 0, cells.size)
    scatter(cells, positions, apply_steps(cells[positions], codes, is_float=True))


# --- byte deltas ---------------------------------------------------------------------------------------------------


def _prefix(old: Cells) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(old.tobytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _patch_from_encode(old: Cells, new: Cells) -> bytes:
    """Level 1 with hash tables as large as the prefix: 2 bytes a change where zstd's own choice of tables takes 37.

    Long-distance matching finds nothing more and is five times as slow.
    """
    log = min(max((old.nbytes - 1).bit_length(), 10), 28)
    how = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=log + 2, hash_log=log, chain_log=log, source_size=new.nbytes, dict_size=old.nbytes
    )
    packer = zstandard.ZstdCompressor(dict_data=_prefix(old), compression_params=how)
    return packer.compress(new.data.cast("B"))


def _patch_from_apply(data: bytes, cells: Cells) -> None:
    reader = zstandard.ZstdDecompressor(dict_data=_prefix(cells), max_window_size=1 << 31)
    cells[:] = np.frombuffer(reader.decompress(data, max_output_size=cells.nbytes), np.uint16)


PEERS = (
    Peer("copy", "tensor", _copy_encode, _copy_apply, "the new tensors as they are"),
    Peer("zstd-1", "tensor", _zstd_encode, _zstd_apply, "the new tensors, zstd level 1"),
    Peer("XOR, zstd-1", "tensor", _xor_encode, _xor_apply, "XOR of whole tensors (slime, SkyRL)"),
    Peer("COO", "tensor", _coo_encode, _coo_apply, "int32 index and bf16 value (verl, vLLM)"),
    Peer("COO, zstd-1", "tensor", _coo_zstd_encode, _coo_zstd_apply, "the same, zstd level 1"),
    Peer("gaps + values, zstd-1", "tensor", _gaps_zstd_encode, _gaps_zstd_apply, "int32 gaps, bf16 values (GRAIL)"),
    Peer("u16 gaps + XOR, zstd-1", "tensor", _short_encode, _short_apply, "16-bit gaps, XOR values (NeMo-RL)"),
    Peer("gaps + steps, pcodec-8", "stripe", _pcodec_encode, _pcodec_apply, "thinwire's numbers, pcodec level 8"),
)
"""The table of peers; adding one touches this file alone."""

PATCH_FROM = Peer("zstd --patch-from", "piece", _patch_from_encode, _patch_from_apply, "byte delta; of a sample")
"""Too slow for whole models; measured on a sample, 16 MiB by 16 MiB (zstd's fast levels read no longer prefix)."""

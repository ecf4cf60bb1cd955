"""The bytes of one update: header, body, check. ``docs/spec/federated.md`` has them byte by byte.

============  =============================================================  ===========================================
kind          body                                                           applies to
============  =============================================================  ===========================================
``ANCHOR``    layout and cells of all tensors                                anything
``SPARSE``    positions and rounded values that are added                    exactly the base it names
``CELLS``     positions of cells and their new bits                          the base, and whatever lies between it and
                                                                             the result
============  =============================================================  ===========================================

A frame is hostile until it is applied: lengths are checked against the base's layout before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.compress.values import BFloat16, Float16, Float32, ValueCodec, value_codec
from thinwire.errors import MalformedError, MisuseError, UnsupportedError
from thinwire.federated.model import DIGEST_BYTES, LAYOUT_BYTES_MAX, ModelLayout, ModelState, is_finite
from thinwire.tensors.bits import cells_of, dtype_of_tensor, tensor_of
from thinwire.wire import rans
from thinwire.wire.cursor import Cursor, put_varint
from thinwire.wire.digests import hasher
from thinwire.wire.positions import gaps_of, positions_of
from thinwire.wire.spec import cell_count, dtype_of
from thinwire.wire.values import rotate_left, rotate_right

__all__ = [
    "ANCHOR",
    "CELLS",
    "FRAME_OVERHEAD",
    "SPARSE",
    "VALUES",
    "Frame",
    "Sparse",
    "encode_anchor",
    "encode_cells",
    "encode_sparse",
    "parse_frame",
    "rounded",
]

ANCHOR, SPARSE, CELLS = 0, 1, 2
VALUES = ("float32", "float16", "bfloat16", "int8", "float8", "sign")
_HEADER = struct.Struct("<2sBBI16s16s")
_MAGIC, _VERSION, _CHECK = b"tw", 1, 8
FRAME_OVERHEAD = _HEADER.size + _CHECK
NOWHERE = bytes(DIGEST_BYTES)

Positions = npt.NDArray[np.uint32]


@final
@dataclass(frozen=True, slots=True)
class Frame:
    """A frame whose check agrees; its body has not been looked into. ``sequence`` counts versions or updates."""

    kind: int
    sequence: int
    base: bytes
    result: bytes
    body: memoryview
    nbytes: int


@final
@dataclass(frozen=True, slots=True)
class Sparse:
    """Flat positions int32 ``[k]``, values float32 ``[k]``, and whole tensors by index."""

    positions: Tensor
    values: Tensor
    whole: Mapping[int, Tensor]

    def applied_to(self, base: ModelState) -> ModelState:
        """``base`` with values added and whole tensors replaced."""
        return base.plus(self.positions, self.values).replaced(self.whole)


def parse_frame(data: bytes | memoryview) -> Frame:
    """Header and check of a frame.

    Raises:
        MalformedError: too short, or the check disagrees with the bytes.
        UnsupportedError: another version or an unknown kind.
    """
    view = memoryview(data)
    if len(view) < FRAME_OVERHEAD:
        raise MalformedError(f"a frame has at least {FRAME_OVERHEAD} bytes, this one {len(view)}", bytes=len(view))
    magic, version, kind, sequence, base, result = _HEADER.unpack(view[: _HEADER.size])
    if magic != _MAGIC:
        raise MalformedError("the bytes are not a thinwire frame")
    if version != _VERSION or kind not in (ANCHOR, SPARSE, CELLS):
        raise UnsupportedError(f"frame version {version}, kind {kind} are unknown; upgrade thinwire")
    if hasher("blake3")(view[:-_CHECK]).digest()[:_CHECK] != bytes(view[-_CHECK:]):
        raise MalformedError("a frame's bytes disagree with its check; it was damaged on the way")
    return Frame(kind, sequence, base, result, view[_HEADER.size : -_CHECK], len(view))


def _sealed(kind: int, sequence: int, base: bytes, result: bytes, body: bytes | bytearray) -> bytes:
    head = _HEADER.pack(_MAGIC, _VERSION, kind, sequence, base, result)
    return b"".join((head, body, hasher("blake3")(head + bytes(body)).digest()[:_CHECK]))


# --- reading and writing parts ------------------------------------------------------------------------------------


def _put_positions(out: bytearray, positions: Positions, limit: int) -> None:
    """Count and gaps; where all cells are meant, the count alone."""
    put_varint(out, positions.size)
    if positions.size < limit:
        stream = rans.encode(gaps_of(positions, 0))
        put_varint(out, len(stream))
        out += stream


def _get_positions(cursor: Cursor, limit: int) -> Positions:
    count = cursor.varint(limit)
    if count == limit:
        return np.arange(limit, dtype=np.uint32)
    length = cursor.varint(rans.encoded_size_max(count, 4))
    # Gaps take at least some bits in all but degenerate tables; what is allocated is bounded by the base's layout.
    gaps = rans.decode(cursor.take(length), count, np.uint32)
    return positions_of(np.ascontiguousarray(gaps), 0, limit)


def _put_words(out: bytearray, words: npt.NDArray[np.unsignedinteger]) -> None:
    """Float cells, rotated so that like exponents are near each other: entropy-coded where that is smaller."""
    raw = words.tobytes()
    coded = rans.encode(rotate_left(words, is_float=True)) if words.itemsize in (2, 4) else raw
    if len(coded) < len(raw):
        out.append(1)
        put_varint(out, len(coded))
        out += coded
    else:
        out.append(0)
        out += raw


def _get_words(cursor: Cursor, count: int, width: int) -> npt.NDArray[np.unsignedinteger]:
    dtype = np.dtype(f"u{width}")
    coded = cursor.take(1)[0]
    if coded == 0:
        return np.frombuffer(cursor.take(count * width), dtype).copy()
    if coded != 1 or width not in (2, 4):
        raise MalformedError(f"values are coded in an unknown way, {coded}")
    length = cursor.varint(rans.encoded_size_max(count, width))
    return rotate_right(rans.decode(cursor.take(length), count, dtype), is_float=True)


# --- anchors -------------------------------------------------------------------------------------------------------


def encode_anchor(state: ModelState, sequence: int, *, base: bytes = NOWHERE) -> bytes:
    """The whole state; ``base`` is the one that a client updated.

    >>> state = ModelState.of({"w": torch.tensor([1.0, 2.0])})
    >>> decode_anchor(parse_frame(encode_anchor(state, 1))).digest == state.digest
    True
    """
    layout = state.layout.encode()
    out = bytearray()
    put_varint(out, len(layout))
    return _sealed(ANCHOR, sequence, base, state.digest, bytes(out) + layout + state.to_bytes())


def decode_anchor(frame: Frame) -> ModelState:
    """The state of an anchor, its digest checked.

    Raises:
        MalformedError: damaged, or not the state that the frame names.
    """
    cursor = Cursor(frame.body, "a frame")
    layout = ModelLayout.parse(bytes(cursor.take(cursor.varint(LAYOUT_BYTES_MAX))))
    state = ModelState.from_bytes(layout, cursor.take(len(cursor.data) - cursor.at))
    if state.digest != frame.result:
        raise MalformedError("an anchor holds another state than it names")
    return state


# --- sparse updates ------------------------------------------------------------------------------------------------


def _scale(values: Tensor, codec: ValueCodec) -> int:
    """A power of two that puts the largest magnitude into the upper range of float16; others need none."""
    if not isinstance(codec, Float16) or not values.numel():
        return 0
    largest = float(values.abs().max())
    return 0 if largest == 0 else max(-100, min(100, 15 - int(np.frexp(largest)[1])))


def rounded(values: Tensor, name: str) -> Tensor:
    """What the receiver will see of float32 ``values`` sent as ``name``: what error feedback subtracts.

    >>> rounded(torch.tensor([1e-7, 1.0 + 1e-4]), "float16")
    tensor([1.0000e-07, 1.0000e+00])
    """
    if not values.numel():
        return values.clone()
    codec = value_codec(name)
    scale = _scale(values, codec)
    packed = codec.encode(torch.ldexp(values, torch.tensor(scale)), 0)
    return torch.ldexp(codec.decode(packed, values.numel()), torch.tensor(-scale))


def encode_sparse(
    positions: Tensor,
    values: Tensor,
    numel: int,
    *,
    name: str = "float16",
    whole: Mapping[int, Tensor] | None = None,
    sequence: int = 0,
    base: bytes = NOWHERE,
    result: bytes = NOWHERE,
) -> bytes:
    """An update of ``numel`` elements: ``values`` float32 ``[k]``, sent as ``name``, at increasing int32 ``positions``.

    Raises:
        MisuseError: no such value codec.
    """
    codec = value_codec(name)
    if name not in VALUES:
        raise MisuseError(f"values cannot travel as {name!r}; there are {', '.join(VALUES)}", name=name)
    scale = _scale(values, codec)
    out = bytearray()
    put_varint(out, numel)
    _put_positions(out, positions.numpy().astype(np.uint32), numel)
    out += struct.pack("<Bb", VALUES.index(name), scale)
    if values.numel():
        packed = codec.encode(torch.ldexp(values, torch.tensor(scale)), 0).numpy()
        if isinstance(codec, Float32 | Float16 | BFloat16):
            _put_words(out, packed.view(f"u{codec.dtype.itemsize}"))
        else:
            out += packed.tobytes()
    _put_whole(out, whole or {})
    return _sealed(SPARSE, sequence, base, result, out)


def decode_sparse(frame: Frame, layout: ModelLayout) -> Sparse:
    """The update of a sparse frame, for a base of ``layout``.

    Raises:
        MalformedError: damaged, of another size, or with a value that is not finite.
    """
    cursor = Cursor(frame.body, "a frame")
    if cursor.varint(1 << 40) != layout.numel:
        raise MalformedError(f"an update of another number of elements than the base's {layout.numel}")
    positions = _get_positions(cursor, layout.numel)
    kind, scale = struct.unpack("<Bb", cursor.take(2))
    if kind >= len(VALUES):
        raise UnsupportedError(f"values of codec {kind} are unknown; upgrade thinwire", codec=kind)
    codec = value_codec(VALUES[kind])
    values = torch.empty(0)
    if positions.size:
        if isinstance(codec, Float32 | Float16 | BFloat16):
            packed = _get_words(cursor, positions.size, codec.dtype.itemsize).view(np.uint8)
        else:
            packed = np.frombuffer(cursor.take(codec.size(positions.size)), np.uint8).copy()
        values = torch.ldexp(codec.decode(torch.from_numpy(packed), positions.size), torch.tensor(-scale))
    if not bool(values.isfinite().all()):
        raise MalformedError("an update holds a value that is not finite")
    whole = _get_whole(cursor, layout)
    cursor.end()
    return Sparse(torch.from_numpy(positions.astype(np.int32)), values, whole)


def _put_whole(out: bytearray, whole: Mapping[int, Tensor]) -> None:
    put_varint(out, len(whole))
    for index, tensor in sorted(whole.items()):
        name = dtype_of_tensor(tensor).name.encode("ascii")
        put_varint(out, index)
        out.append(len(name))
        out += name
        out += cells_of(tensor).tobytes()


def _get_whole(cursor: Cursor, layout: ModelLayout) -> dict[int, Tensor]:
    whole: dict[int, Tensor] = {}
    last = -1
    for _ in range(cursor.varint(len(layout.rows))):
        index = cursor.varint(len(layout.rows) - 1)
        if index <= last:
            raise MalformedError("whole tensors of a frame are not in order")
        last = index
        dtype = dtype_of(bytes(cursor.take(cursor.take(1)[0])).decode("ascii", "replace"))
        shape = layout.rows[index][2]
        count = cell_count(dtype, shape)
        cells = np.frombuffer(cursor.take(count * dtype.cell_bytes), dtype.cells).copy()
        tensor = tensor_of(cells, dtype.name, shape)
        if not is_finite(tensor):
            raise MalformedError("a whole tensor of an update holds a value that is not finite")
        whole[index] = tensor
    return whole


# --- exact changes -------------------------------------------------------------------------------------------------


def _all_cells(state: ModelState) -> list[npt.NDArray[np.unsignedinteger]]:
    return [cells_of(tensor) for tensor in state.tensors]


def changed_cells(state: ModelState, base: ModelState) -> Positions:
    """Cells, counted over all tensors, that differ. The two have one layout."""
    found, offset = [np.empty(0, np.uint32)], 0
    for new, old in zip(_all_cells(state), _all_cells(base), strict=True):
        found.append((np.flatnonzero(new != old) + offset).astype(np.uint32))
        offset += new.size
    return np.concatenate(found)


def _pick(positions: Positions, cells: Sequence[npt.NDArray[np.unsignedinteger]]) -> list[npt.NDArray[np.int64]]:
    """Of each tensor, indices of its cells that are among ``positions``."""
    picked, offset = [], 0
    for part in cells:
        first, last = np.searchsorted(positions, (offset, offset + part.size))
        picked.append(positions[first:last].astype(np.int64) - offset)
        offset += part.size
    return picked


def encode_cells(state: ModelState, positions: Positions, *, sequence: int = 0, base: bytes = NOWHERE) -> bytes:
    """The bits of ``state`` at cell ``positions``: exact, and applying it twice does no harm."""
    cells = _all_cells(state)
    out = bytearray()
    put_varint(out, sum(part.size for part in cells))
    _put_positions(out, positions, sum(part.size for part in cells))
    pools: dict[int, list[npt.NDArray[np.unsignedinteger]]] = {1: [], 2: [], 4: [], 8: []}
    for part, at in zip(cells, _pick(positions, cells), strict=True):
        pools[part.itemsize].append(part[at])
    for width, pool in pools.items():
        if pool:
            _put_words(out, np.concatenate(pool).astype(f"u{width}", copy=False))
    return _sealed(CELLS, sequence, base, state.digest, out)


def decode_cells(frame: Frame, base: ModelState) -> ModelState:
    """The state that a frame of cells leads to from ``base``; whether it is the one named is for the caller to check.

    Raises:
        MalformedError: damaged, or of another layout.
    """
    cells = _all_cells(base)
    total = sum(part.size for part in cells)
    cursor = Cursor(frame.body, "a frame")
    if total >= 1 << 32 or cursor.varint(1 << 40) != total:
        raise MalformedError(f"an exact update of another number of cells than the base's {total}")
    positions = _get_positions(cursor, total)
    picked = _pick(positions, cells)
    words: dict[int, npt.NDArray[np.unsignedinteger]] = {}
    for width in (1, 2, 4, 8):
        of_width = [at.size for part, at in zip(cells, picked, strict=True) if part.itemsize == width]
        if of_width:
            words[width] = _get_words(cursor, sum(of_width), width)
    cursor.end()
    used = dict.fromkeys(words, 0)
    tensors = []
    for (_, dtype, shape), part, at in zip(base.layout.rows, cells, picked, strict=True):
        width = part.itemsize
        fresh = part.copy()
        fresh[at] = words[width][used[width] : used[width] + at.size]
        used[width] += at.size
        tensors.append(tensor_of(fresh, dtype, shape))
    return ModelState(base.layout, tuple(tensors))

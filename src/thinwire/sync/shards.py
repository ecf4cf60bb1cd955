"""The shards that one rank holds of a model's tensors, and how cells move between boxes of one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from thinwire.errors import MisuseError
from thinwire.sync.chunking import Shard
from thinwire.sync.layout import Layout
from thinwire.tensors.bits import cells_of, is_host_view, shape_of
from thinwire.tensors.tree import State, state_of
from thinwire.wire.chunks import Box, Chunk, overlap
from thinwire.wire.spec import DType, dtype_of

__all__ = ["ChunkSource", "Held", "Slice", "assemble", "held_by", "local_state", "shards_of"]

Cells = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a larger tensor, for shards that are no DTensors: ``tensor`` begins at ``offsets`` of one of ``shape``.

    >>> quarter = Slice(torch.zeros(2, 8), offsets=(4, 0), shape=(8, 8))
    """

    tensor: torch.Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


Entries = torch.nn.Module | Mapping[str, torch.Tensor | Slice]


@dataclass(frozen=True, slots=True)
class Held:
    """What this rank holds of one tensor: ``local`` is ``box`` of a tensor of ``shape``. Nothing is copied."""

    local: torch.Tensor
    box: Box
    shape: tuple[int, ...]


def held_by(model: Entries) -> dict[str, Held]:
    """The shards of a model's state by name, in order of names: DTensors' local ones, plain tensors whole.

    Raises:
        MisuseError: an entry is no tensor, a DTensor is a partial sum, or a slice is not inside its tensor.
    """
    entries: Mapping[str, Any] = model.state_dict() if isinstance(model, torch.nn.Module) else model
    found = {}
    for name in sorted(entries):
        try:
            found[name] = _held(entries[name])
        except MisuseError as error:
            raise MisuseError(f"state dict entry {name!r}: {error}", tensor=name) from error
    return found


def _held(value: Any) -> Held:
    if isinstance(value, Slice):
        local = value.tensor.detach()
        held = Held(local, Box(tuple(value.offsets), shape_of(local)), tuple(value.shape))
        if not len(value.offsets) == len(value.shape) == local.dim():
            raise MisuseError("offsets, shape and the tensor have different numbers of dimensions")
        if min(value.offsets, default=0) < 0 or not Box((0,) * local.dim(), held.shape).contains(held.box):
            raise MisuseError(f"{held.box} is not inside a tensor of shape {held.shape}")
        return held
    if not isinstance(value, torch.Tensor):
        raise MisuseError(f"it is a {type(value).__name__}, not a tensor; pass a dict without it")
    if hasattr(value, "device_mesh"):
        return _held_of_dtensor(value.detach())
    shape = shape_of(value)
    return Held(value.detach(), Box((0,) * len(shape), shape), shape)


def _held_of_dtensor(value: Any) -> Held:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in value.placements):
        raise MisuseError("it is a partial sum on each rank; redistribute it first")
    local, shape = value.to_local(), tuple(value.shape)
    sizes, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    if not local.numel():
        return Held(local, Box((0,) * len(shape), (0,) * len(shape)), shape)
    if tuple(sizes) != tuple(local.shape) or shape_of(local) != tuple(local.shape):
        raise MisuseError(f"its shard has shape {tuple(local.shape)}, which its mesh does not tell")
    return Held(local, Box(tuple(offsets), tuple(sizes)), shape)


def shards_of(held: Mapping[str, Held], state: State) -> list[Shard]:
    """What there is to tell other ranks of this rank's shards; ``state`` is that of the local tensors."""
    found = []
    for name, item in held.items():
        first = state.aliases.get(name, name)
        known = item.box.volume or not Box(item.box.offsets, item.shape).volume
        found.append(Shard(name, state.dtype_name(first), item.shape, item.box, first if known else None))
    return found


class ChunkSource:
    """The chunks that this rank publishes, read from its shards block by block: no shard is copied whole.

    (But one that is neither contiguous nor real is.)
    """

    def __init__(self, held: Mapping[str, Held], chunks: Iterable[Chunk], cast: torch.dtype | None) -> None:
        self.aliases: dict[str, str] = {}
        self.state = State({name: item.local for name, item in held.items()}, {}, cast)
        self._parts: dict[str, tuple[str, torch.Tensor]] = {}
        self._views: dict[str, Cells] = {}
        self.layouts: dict[str, Layout] = {}
        for chunk in sorted(chunks, key=lambda chunk: chunk.name):
            item, name = held[chunk.tensor], chunk.name
            part = item.local[chunk.box.slices(item.box.offsets)] if chunk.box.volume and item.shape else item.local
            if chunk.box == item.box:
                part = item.local  # packed types count elements otherwise than torch
            self._parts[name] = chunk.tensor, part
            self.layouts[name] = Layout(dtype_of(self.state.dtype_name(chunk.tensor)), chunk.box.sizes)
            if is_host_view(part) and not self.state.casts(part):
                self._views[name] = cells_of(part)

    def read(self, name: str, start: int, stop: int) -> Cells:
        if name in self._views:
            return self._views[name][start:stop]
        _, part = self._parts[name]
        if part.is_complex() or part.dim() == 0:
            self._views[name] = cells_of(self._cast(part))
            return self._views[name][start:stop]
        row = part[0].numel()
        first = start // row
        rows = part[first : -(-stop // row)]
        return cells_of(self._cast(rows.reshape(-1)[start - first * row : stop - first * row]))

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.state.cast) if self.state.casts(tensor) else tensor


def local_state(held: Mapping[str, Held], cast: torch.dtype | None) -> State:
    """The local tensors as a state: which names share memory on this rank."""
    return state_of({name: item.local for name, item in held.items()}, cast=cast)


# --- from boxes to boxes -------------------------------------------------------------------------------------------


def _grid(cells: Cells, dtype: DType, sizes: tuple[int, ...]) -> Cells:
    """Cells in the shape of their box; a last dimension counts the cells of an element."""
    return cells.reshape(*sizes, max(1, dtype.element_bits // (8 * dtype.cell_bytes)))


def assemble(box: Box, dtype: DType, pieces: Iterable[tuple[Box, Cells]]) -> Cells:
    """The cells of ``box``, from pieces that together hold all of it.

    Raises:
        MisuseError: they do not, or a packed type is cut.

    >>> pieces = [(Box((0,), (2,)), np.array([1, 2], np.uint16)), (Box((2,), (2,)), np.array([3, 4], np.uint16))]
    >>> assemble(Box((1,), (2,)), dtype_of("BF16"), pieces).tolist()
    [2, 3]
    """
    packed = dtype.element_bits % (8 * dtype.cell_bytes) != 0
    found = np.empty(0 if packed else box.volume * dtype.element_bits // (8 * dtype.cell_bytes), dtype.cells)
    grid, filled = (found if packed else _grid(found, dtype, box.sizes)), 0
    for other, cells in pieces:
        if other == box:
            return cells.copy()
        both = overlap(box, other)
        if both is None:
            continue
        if packed:
            raise MisuseError(f"{dtype.name} holds two elements in a byte and cannot be cut")
        grid[both.slices(box.offsets)] = _grid(cells, dtype, other.sizes)[both.slices(other.offsets)]
        filled += both.volume
    if filled != box.volume:
        raise MisuseError(f"only {filled} of the {box.volume} elements of {box} are at hand")
    return found

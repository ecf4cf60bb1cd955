"""A model, or the slices of one, as the place where the chunks of a share are written."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from thinwire.errors import MisuseError, RebaseError
from thinwire.sync.layout import Layout
from thinwire.sync.shards import Held
from thinwire.sync.share import Share
from thinwire.sync.target import overlapping
from thinwire.tensors.bits import cells_of, dtype_of_tensor, is_host_view, tensor_of
from thinwire.tensors.device import scatter_
from thinwire.wire.chunks import Box, Chunk, ChunkMap, overlap

__all__ = ["ShareTarget", "check_fits", "wanted_by"]

Cells = npt.NDArray[np.unsignedinteger]


def check_fits(held: Mapping[str, Held], chunks: ChunkMap, *, partial: bool) -> None:
    """Whether a model's tensors are those of a version, by name, data type and whole shape.

    Raises:
        MisuseError: they are not. ``partial`` allows the model to lack some.
    """
    published = set(chunks.tensors) | set(chunks.aliases)
    missing, unexpected = sorted(published - set(held)), sorted(set(held) - published)
    if unexpected or (missing and not partial):
        raise MisuseError(
            f"the model is not of the published kind: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} are not published {unexpected[:3]}"
            + ("" if partial else ". A consumer that takes some tensors only says so: partial=True"),
            missing=missing,
            unexpected=unexpected,
        )
    for name, item in held.items():
        tensor, dtype = chunks.tensors[chunks.aliases.get(name, name)], dtype_of_tensor(item.local).name
        if (dtype, item.shape) != (tensor.dtype, tensor.shape):
            raise MisuseError(
                f"{name!r} is published as {tensor.dtype} {tensor.shape}, the model has {dtype} {item.shape}; convert "
                "the model first, for example model.to(torch.bfloat16)",
                tensor=name,
            )


def wanted_by(held: Mapping[str, Held]) -> dict[str, list[Box]]:
    """The boxes that a model's shards are."""
    return {name: [item.box] for name, item in held.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a chunk, or what of it is in ``both``, goes: ``tensor`` is that part of a shard."""

    chunk: Chunk
    both: Box
    tensor: torch.Tensor


class ShareTarget:
    """The chunks of ``share`` over the memory of a model's shards.

    ``cells`` are views where a chunk lies whole and contiguous in a shard on the host. Chunks that lie whole in one in
    other ways are copied here, and written back by :meth:`commit`. Of chunks that reach over a shard's end the whole is
    kept in ``beside``, from one target to the next, for only whole chunks can be proved.

    Args:
        held: the model's shards by name, which fit the share's map (:func:`check_fits`).
        beside: whole chunks by full name, kept by the caller; those that are not there yet are added.
        read: whether the model's cells are needed; else all will be overwritten.
    """

    def __init__(self, held: Mapping[str, Held], share: Share, beside: dict[str, Cells], *, read: bool) -> None:
        self.share, self.layouts = share, dict(share.layouts)
        self.cells: dict[str, Cells] = {}
        self._staged: dict[str, _Place] = {}
        self._mirrors: list[_Place] = []
        names_of = _distinct(held, share.chunks.aliases)
        touching = overlapping({name: held[name].local for names in names_of.values() for name in names})
        for chunk in share.members:
            found = [(name, _place(held[name], chunk)) for name in names_of.get(chunk.tensor, ())]
            places = [(name, place) for name, place in found if place is not None]
            full, layout = chunk.full_name, share.layouts[chunk.full_name]
            whole = next((at for at, (_, place) in enumerate(places) if place.both == chunk.box), None)
            if whole is None:
                if full not in beside:
                    beside[full] = np.empty(layout.cells, layout.dtype.cells)
                self.cells[full] = beside[full]
            else:
                name, place = places.pop(whole)
                beside.pop(full, None)
                if is_host_view(place.tensor) and name not in touching:
                    self.cells[full] = cells_of(place.tensor)
                else:
                    self._staged[full] = place
                    self.cells[full] = _copied(place.tensor) if read else np.empty(layout.cells, layout.dtype.cells)
            self._mirrors += [place for _, place in places]

    @property
    def staged(self) -> Set[str]:
        """Full names of chunks whose cells are copies that belong to one place."""
        return self._staged.keys()

    def commit(self, touched: Mapping[str, npt.NDArray[np.int64] | None] | None = None) -> None:
        """Write to the shards what is not a view of them. ``touched`` gives changed positions, where they are known.

        Raises:
            RebaseError: two tensors that share memory are set differently.
        """
        with torch.no_grad():
            for full, place in self._staged.items():
                where = (touched or {}).get(full)
                if where is not None and place.tensor.is_contiguous() and where.size < place.tensor.numel() // 8:
                    scatter_(place.tensor, where, self.cells[full][where])
                else:
                    place.tensor.copy_(self._tensor(place))
            for place in self._mirrors:
                place.tensor.copy_(self._tensor(place))
            for full, place in self._staged.items():
                if not np.array_equal(cells_of(place.tensor), self.cells[full]):
                    raise RebaseError(
                        f"tensor {place.chunk.tensor!r} shares its memory with another one that this version sets "
                        "differently; untie them before loading",
                        tensor=place.chunk.tensor,
                    )

    def _tensor(self, place: _Place) -> torch.Tensor:
        chunk = place.chunk
        layout: Layout = self.layouts[chunk.full_name]
        whole = tensor_of(self.cells[chunk.full_name], layout.dtype.name, layout.shape)
        return whole if place.both == chunk.box else whole[place.both.slices(chunk.box.offsets)]

    def write(self, cells: Mapping[str, Cells]) -> None:
        """Overwrite everything with ``cells``."""
        for name, mine in self.cells.items():
            mine[:] = cells[name]
        self.commit()


def _copied(tensor: torch.Tensor) -> Cells:
    """A copy of a tensor's cells, made once."""
    return cells_of(tensor).copy() if is_host_view(tensor) else cells_of(tensor)


def _distinct(held: Mapping[str, Held], aliases: Mapping[str, str]) -> dict[str, list[str]]:
    """The names under which a model holds each published tensor, one for each memory."""
    found: dict[str, dict[object, str]] = {}
    for name, item in held.items():
        memory = item.local.data_ptr(), item.local.stride(), item.box
        found.setdefault(aliases.get(name, name), {}).setdefault(memory if item.local.numel() else name, name)
    return {tensor: list(names.values()) for tensor, names in found.items()}


def _place(item: Held, chunk: Chunk) -> _Place | None:
    """Where a chunk lies in a shard; None if it does not."""
    if chunk.box == item.box:
        return _Place(chunk, chunk.box, item.local)
    both = overlap(item.box, chunk.box)
    return None if both is None else _Place(chunk, both, item.local[both.slices(item.box.offsets)])

"""How the work on a state is cut: blocks, which are hashed, and stripes of blocks, which threads take whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from thinwire.tensors.bits import cells_of, is_host_view, shape_of
from thinwire.tensors.digest import block_cells
from thinwire.tensors.tree import State
from thinwire.wire.spec import SEGMENT_CELLS_MAX, DType, cell_count, dtype_of

__all__ = ["Block", "CellSource", "Layout", "MemorySource", "StateSource", "Stripe", "layouts_equal", "stripes"]

Cells = npt.NDArray[np.unsignedinteger]

STRIPE_CELLS = 1 << 25
assert STRIPE_CELLS <= SEGMENT_CELLS_MAX


@dataclass(frozen=True, slots=True)
class Layout:
    """Data type and shape of a tensor."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def cells(self) -> int:
        """Number of cells."""
        return cell_count(self.dtype, self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.cells * self.dtype.cell_bytes


@dataclass(frozen=True, slots=True)
class Block:
    """Cells ``start`` to ``stop`` of a tensor: the ``index``-th leaf of its digest."""

    name: str
    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Stripe:
    """Consecutive blocks of tensors of one data type."""

    dtype: DType
    blocks: tuple[Block, ...]

    @property
    def cells(self) -> int:
        """Number of cells."""
        return sum(b.stop - b.start for b in self.blocks)


class CellSource(Protocol):
    """A state that can be read by blocks. Threads read at once."""

    @property
    def layouts(self) -> Mapping[str, Layout]: ...

    @property
    def aliases(self) -> Mapping[str, str]: ...

    def read(self, name: str, start: int, stop: int) -> Cells:
        """Cells ``start`` to ``stop`` of a tensor; a view or a copy, not to be written."""
        ...


class MemorySource:
    """Cells that lie in memory (or in a mapped file)."""

    def __init__(
        self, layouts: Mapping[str, Layout], cells: Mapping[str, Cells], aliases: Mapping[str, str] | None = None
    ) -> None:
        self.layouts = dict(sorted(layouts.items()))
        self.cells = dict(cells)
        self.aliases = dict(aliases or {})

    def read(self, name: str, start: int, stop: int) -> Cells:
        return self.cells[name][start:stop]


class StateSource:
    """A model's state, read where it is: views on the host, copies by block from devices and through casts."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.aliases = state.aliases
        self.layouts = {
            name: Layout(dtype_of(state.dtype_name(name)), shape_of(t)) for name, t in state.tensors.items()
        }
        self._views: dict[str, Cells] = {}
        for name, tensor in state.tensors.items():
            if is_host_view(tensor) and not state.casts(tensor):
                self._views[name] = cells_of(tensor)

    def read(self, name: str, start: int, stop: int) -> Cells:
        if name in self._views:
            return self._views[name][start:stop]
        tensor = self.state.tensors[name]
        if not tensor.is_contiguous() or tensor.is_complex():  # whole once; such tensors are rare in models
            whole = tensor.to(self.state.cast) if self.state.casts(tensor) else tensor
            self._views[name] = cells_of(whole)
            return self._views[name][start:stop]
        part = tensor.reshape(-1)[start:stop]
        return cells_of(part.to(self.state.cast) if self.state.casts(tensor) else part)


def stripes(rows: Iterable[tuple[str, Layout]], *, group_of: Callable[[str], object] | None = None) -> list[Stripe]:
    """Cut tensors into stripes, in their order, data type by data type; none reaches over the end of a group."""
    by_dtype: dict[str, list[tuple[str, Layout]]] = {}
    for name, layout in rows:
        by_dtype.setdefault(layout.dtype.name, []).append((name, layout))
    found: list[Stripe] = []
    for members in by_dtype.values():
        dtype = members[0][1].dtype
        step = block_cells(dtype.cell_bytes)
        blocks: list[Block] = []
        held, last = 0, None
        for name, layout in members:
            group = None if group_of is None else group_of(name)
            if blocks and group != last:
                found.append(Stripe(dtype, tuple(blocks)))
                blocks, held = [], 0
            last = group
            for index, start in enumerate(range(0, layout.cells, step)):
                block = Block(name, index, start, min(start + step, layout.cells))
                if held + step > STRIPE_CELLS:
                    found.append(Stripe(dtype, tuple(blocks)))
                    blocks, held = [], 0
                blocks.append(block)
                held += block.stop - block.start
        if blocks:
            found.append(Stripe(dtype, tuple(blocks)))
    return found


def layouts_equal(a: Mapping[str, Layout], b: Mapping[str, Layout]) -> bool:
    """Whether two states have the same tensors, by name, data type and shape."""
    return dict(a) == dict(b)

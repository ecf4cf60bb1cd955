"""A model whose weights are overwritten by tasks and put back, in place: each write touches the changed cells alone.

A task is a set of cells with what the base holds there and what the task wants there. Both are kept, since arithmetic
cannot bring the base back: adding a bfloat16 difference and subtracting it again leaves some weights one step off.
Writing cells is idempotent, so that a switch which is broken off half-way is mended by doing it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch

from thinwire.errors import MalformedError, MisuseError, WrongBaseError
from thinwire.integrations.patch_deltas import PatchReader
from thinwire.merge.delta import TensorDelta
from thinwire.sync.apply import tree_of
from thinwire.sync.layout import Layout, MemorySource
from thinwire.tensors.bits import cells_of, dtype_of_tensor, is_host_view, shape_of
from thinwire.tensors.device import bits_of
from thinwire.tensors.digest import digest_cells
from thinwire.tensors.kernels import advance
from thinwire.wire.digests import Tree
from thinwire.wire.patch import Patch

__all__ = ["Model", "Names", "Overlay", "Stack", "Task"]

Cells = npt.NDArray[np.unsignedinteger]
Model = torch.nn.Module | Mapping[str, torch.Tensor]
Names = Callable[[str], str] | Mapping[str, str]
"""From the name that a tensor has in patches to the one it has in the model."""
Stack = tuple[str, ...]
"""Names of the tasks that are on the model: later ones overwrite earlier ones."""


class _Site:
    """One tensor's memory, to be written at single cells. Two of them never share bytes."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.tensor, self._strides, self._shape = tensor, tensor.stride(), tuple(tensor.shape)
        flat = tensor.detach()
        self._plain = tensor.is_contiguous()
        if not self._plain:
            extent = 1 + sum((n - 1) * s for n, s in zip(self._shape, self._strides, strict=True))
            if extent != tensor.numel() or dtype_of_tensor(tensor).cell_bytes != tensor.element_size():
                raise MisuseError(f"{name!r} is a view with gaps or repetitions; make it contiguous first", tensor=name)
            flat = flat.as_strided((extent,), (1,))
        self._cells = cells_of(flat) if is_host_view(flat) else None
        self._bits = bits_of(flat)

    def prepare(self, positions: npt.NDArray[np.signedinteger], cells: Sequence[Cells]) -> _Prepared:
        """Positions in C order and what to write there, brought to where and how the tensor lies."""
        if not self._plain:
            index = np.unravel_index(positions, self._shape)
            moved = sum(i * s for i, s in zip(index, self._strides, strict=True))
            positions = np.asarray(moved).astype(positions.dtype)
        if self._cells is not None:
            where = positions.view(np.uint32) if positions.dtype == np.int32 else positions
            return _Prepared(self, where, tuple(cells))
        device = self._bits.device
        signed = [torch.from_numpy(c.view(f"i{c.itemsize}") if c.itemsize > 1 else c).to(device) for c in cells]
        return _Prepared(self, torch.from_numpy(positions).to(device), tuple(signed))

    def write(self, where: object, cells: object) -> None:
        if self._cells is not None:
            assert isinstance(where, np.ndarray)
            assert isinstance(cells, np.ndarray)
            advance(self._cells, 0, where, cells, 0, where.size, is_float=False, values="absolute")
        else:
            assert isinstance(where, torch.Tensor)
            assert isinstance(cells, torch.Tensor)
            self._bits.index_copy_(0, where.long(), cells)  # kept as int32: half the memory between two switches
        if not self.tensor.is_inference():
            torch.autograd.graph.increment_version(self.tensor)  # a backward pass across a switch fails, as it must


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Where to write in one site, and the base's cells and the task's to be written."""

    site: _Site
    where: object
    cells: tuple[object, ...]

    def write(self, which: int) -> None:
        self.site.write(self.where, self.cells[which])


@dataclass(frozen=True, slots=True)
class Task:
    """Cells to overwrite, by the patch's names; ``result`` is the digest of what the patch leads to, None if unknown.

    ``deltas`` and what is prepared from them share their memory where the model is on the host.
    """

    deltas: Mapping[str, TensorDelta]
    result: str | None
    prepared: tuple[_Prepared, ...] = field(repr=False, default=())

    @property
    def changed(self) -> int:
        """Number of cells that it overwrites."""
        return sum(delta.changed for delta in self.deltas.values())

    @property
    def size(self) -> int:
        """Bytes that the task occupies: a position, the base's cell and its own for every change."""
        return sum(d.positions.nbytes + d.base.nbytes + d.new.nbytes for d in self.deltas.values())


def _lies(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two names of one tensor have in common."""
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _entries(model: Model) -> dict[str, torch.Tensor]:
    found = model.state_dict(keep_vars=True) if isinstance(model, torch.nn.Module) else model
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


class _Binding:
    """Which tensors of the model each name of a patch stands for, and their memory."""

    def __init__(self, model: Model, patch: Patch, names: Names | None) -> None:
        entries = _entries(model)
        rename = names if callable(names) else (names or {}).get
        self.aliases = dict(patch.aliases)
        self.tensors: dict[str, torch.Tensor] = {}
        self.sites: dict[str, list[_Site]] = {row.name: [] for row in patch.rows}
        self._lying: dict[str, int] = {}
        bound: dict[tuple[object, ...], str] = {}
        for name in [*self.sites, *self.aliases]:
            mine, canonical = rename(name) or name, self.aliases.get(name, name)
            if mine not in entries:
                if name != canonical:
                    continue  # a state dict may leave a tied name out
                raise MisuseError(f"the model has no tensor {mine!r}, as the patch has; names= maps them", tensor=name)
            tensor = entries[mine].detach()
            self._lying[mine] = tensor.data_ptr()
            self.tensors.setdefault(canonical, tensor)
            if tensor.numel() and bound.setdefault(_lies(tensor), canonical) != canonical:
                _refuse_shared(canonical, bound[_lies(tensor)])
            if tensor.numel() and not any(_lies(site.tensor) == _lies(tensor) for site in self.sites[canonical]):
                self.sites[canonical].append(_Site(name, tensor))
        self._check_apart()
        strange = sorted(name for name, t in entries.items() if t.numel() and _lies(t) not in bound)
        if strange:
            raise MisuseError(
                f"the model has tensors that the patch does not know: {strange[:3]}; pass the part that it does know"
            )
        self.layouts = {n: Layout(dtype_of_tensor(t), shape_of(t)) for n, t in self.tensors.items()}

    def _check_apart(self) -> None:
        spans = [(*_span(site.tensor), name) for name, sites in self.sites.items() for site in sites]
        end, holder = 0, ""
        for start, stop, name in sorted(spans):
            if start < end:
                _refuse_shared(holder, name)
            end, holder = stop, name

    def check_in_place(self, model: Model) -> None:
        """Whether the model's tensors are still where they were.

        Raises:
            MisuseError: the model was moved, or its tensors replaced.
        """
        entries = _entries(model)
        for name, pointer in self._lying.items():
            if name not in entries or entries[name].data_ptr() != pointer:
                raise MisuseError(
                    f"{name!r} lies elsewhere than when the tasks were loaded; after model.to() or load_state_dict("
                    "assign=True) make a new router, outside of any task",
                    tensor=name,
                )

    def source(self) -> MemorySource:
        """All cells as they are now: views on the host, copies from devices."""
        for name, sites in self.sites.items():
            first = cells_of(sites[0].tensor) if len(sites) > 1 else None
            if first is not None and not all(np.array_equal(first, cells_of(other.tensor)) for other in sites[1:]):
                raise WrongBaseError(f"{name!r} is tied in the patch, but differs from its copies here", tensor=name)
        return MemorySource(self.layouts, {n: cells_of(t) for n, t in self.tensors.items()}, self.aliases)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (extent + 1) * tensor.element_size()


def _refuse_shared(one: str, other: str) -> NoReturn:
    raise MisuseError(f"{one!r} and {other!r} share memory in the model, but not in the patch; untie them first")


class Overlay:
    """Tasks by name over one model, and which of them are on it.

    Not for several threads (:class:`thinwire.integrations.turns.Turns` sees to that). The model's tensors must stay
    where they are from the first :meth:`read` on; a switch refuses to go on if they do not.
    """

    def __init__(self, model: Model, names: Names | None = None) -> None:
        self.model, self.names = model, names
        self.tasks: dict[str, Task] = {}
        self.stack: Stack = ()
        self._binding: _Binding | None = None
        self._trees: dict[str, Tree] = {}
        self._suspect: set[str] = set()  # tasks that may be on the model in part

    # --- digests ---------------------------------------------------------------------------------------------------

    def tree(self, hash_name: str = "blake3") -> Tree:
        """The tree of the model as it is now, hashed from its memory.

        Raises:
            MisuseError: nothing has been read yet, so that the tensors' names are not known.
        """
        source = self.source()
        return tree_of(source.layouts, source.cells, source.aliases, hash_name=hash_name)

    def source(self) -> MemorySource:
        """All cells as they are now: views on the host, copies from devices.

        Raises:
            MisuseError: nothing has been read yet.
        """
        return self._bound().source()

    def base_tree(self, hash_name: str = "blake3") -> Tree:
        """The tree of the base; if it was not hashed with this hash yet, the tasks leave the model meanwhile.

        Raises:
            MisuseError: nothing has been read yet.
        """
        if hash_name not in self._trees:
            stack = self.stack
            self.switch(())
            try:
                self._trees[hash_name] = self.tree(hash_name)
            finally:
                self.switch(stack)
        return self._trees[hash_name]

    def _bound(self) -> _Binding:
        if self._binding is None:
            raise MisuseError("no task has been loaded yet: their patches tell how the base's tensors are named")
        return self._binding

    # --- tasks -----------------------------------------------------------------------------------------------------

    def read(self, patch: Patch) -> Task:
        """The task that ``patch`` makes of the model, which must be at its parent; proved by the result's digest.

        Where other tasks are on the model (the patch was made from the base with these), the task holds what the *base*
        has at the patch's positions. Memory while it reads: one tensor; the whole model where it is not on the host.

        Raises:
            WrongBaseError: the model is not at the patch's parent; both digests are named.
            MisuseError: the patch adds, removes or reshapes tensors, or the model has others.
            MalformedError, UnsupportedError: the patch is damaged.
        """
        binding = self._binding or _Binding(self.model, patch, self.names)
        if (dict(patch.aliases), {row.name for row in patch.rows}) != (binding.aliases, set(binding.tensors)):
            raise WrongBaseError("the patch names its tensors otherwise than those loaded before")
        source = binding.source()
        known = self._trees.get(patch.hash) if not self.stack else None
        tree = known or tree_of(source.layouts, source.cells, source.aliases, hash_name=patch.hash)
        if tree.digest != patch.parent:
            raise WrongBaseError(
                f"the patch starts from {patch.parent}, the model is at {tree.digest}; load the weights that it was "
                "made from, or make it again from these (thinwire diff)",
                expected=patch.parent,
                actual=tree.digest,
            )
        deltas, infos = {}, dict(tree.tensors)
        reader = PatchReader(patch, source)
        for name in reader.changed:
            deltas[name] = delta = reader.delta(name)
            cells = source.cells[name].copy()
            cells[delta.positions] = delta.new
            infos[name] = digest_cells(patch.hash, delta.dtype, delta.shape, cells)
        result = Tree(patch.hash, infos, source.aliases).digest
        if result != patch.result:
            raise MalformedError(f"the patch promises {patch.result}, but leads to {result}; get it again")
        self._binding = binding
        if not self.stack:
            self._trees[patch.hash] = tree
        return self.prepared(self._against_base(deltas) if self.stack else deltas, result)

    def _against_base(self, deltas: Mapping[str, TensorDelta]) -> dict[str, TensorDelta]:
        stack, found = self.stack, {}
        self.switch(())
        try:
            for name, d in deltas.items():
                cells = cells_of(self._bound().tensors[name])
                found[name] = TensorDelta(d.dtype, d.shape, d.positions, cells[d.positions], d.new)
        finally:
            self.switch(stack)
        return found

    def prepared(self, deltas: Mapping[str, TensorDelta], result: str | None = None) -> Task:
        """A task made of ``deltas`` against the base, ready to be written."""
        sites = self._bound().sites
        changed = [(name, d) for name, d in deltas.items() if d.changed]
        prepared = [site.prepare(d.positions, (d.base, d.new)) for name, d in changed for site in sites[name]]
        return Task(dict(deltas), result, tuple(prepared))

    # --- switching -------------------------------------------------------------------------------------------------

    def switch(self, target: Stack) -> None:
        """Put exactly the tasks of ``target`` on the base: the cells of those that leave, then of those that come.

        If it is broken off, calling it again (with any target) mends what was left half-done.

        Raises:
            MisuseError: a task is not there.
        """
        for name in target:
            if name not in self.tasks:
                raise MisuseError(f"there is no task {name!r}; known are {sorted(self.tasks)[:10]}", task=name)
        if target == self.stack and not self._suspect:
            return
        if self._binding is not None:
            self._binding.check_in_place(self.model)
        keep = 0
        while not self._suspect and keep < min(len(target), len(self.stack)) and target[keep] == self.stack[keep]:
            keep += 1
        leaving = self._suspect | set(self.stack[keep:])
        self._suspect |= {*self.stack, *target}
        for name in leaving:
            self._write(name, 0)
        for name in target if leaving else target[keep:]:  # what leaves may have covered what stays
            self._write(name, 1)
        self.stack = target
        self._suspect = set()

    def _write(self, name: str, which: int) -> None:
        with torch.no_grad():
            for one in self.tasks[name].prepared:
                one.write(which)

"""A model as the place where versions are written: cells in place on the host, staged copies elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np
import numpy.typing as npt
import torch

from thinwire.errors import MisuseError, RebaseError
from thinwire.sync.layout import Layout
from thinwire.tensors.bits import cells_of, dtype_of_tensor, is_host_view, shape_of, tensor_of
from thinwire.tensors.device import scatter_
from thinwire.tensors.tree import state_of

__all__ = ["Target", "overlapping"]

Cells = npt.NDArray[np.unsignedinteger]
Model = torch.nn.Module | Mapping[str, torch.Tensor]


def overlapping(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of tensors that share bytes with another one, without being the same tensor."""
    spans: list[tuple[int, int, str]] = []
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.layout is torch.strided and tensor.device.type != "meta":
            extent = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (extent + 1) * tensor.element_size(), name))
    spans.sort()
    found: set[str] = set()
    end, holder = 0, ""
    for start, stop, name in spans:
        if start < end:
            found |= {name, holder}
        if stop > end:
            end, holder = stop, name
    return found


class Target:
    """The tensors of ``model`` under the names, data types and shapes that a version has.

    ``cells`` are views of the model's memory where that is possible (contiguous tensors on the host); for tensors on
    devices, with other strides, or that overlap each other, they are copies that :meth:`commit` writes back.

    Raises:
        MisuseError: the model lacks tensors, has others, or has them with another data type or shape.
    """

    def __init__(self, model: Model, layouts: Mapping[str, Layout], aliases: Mapping[str, str], *, read: bool) -> None:
        entries = dict(model.state_dict()) if isinstance(model, torch.nn.Module) else dict(model)
        _check(entries, layouts, aliases)
        canonical = {name: entries[name].detach() for name in layouts}
        shared = state_of(canonical).aliases
        staged = (
            overlapping({n: t for n, t in canonical.items() if n not in shared}) | set(shared) | set(shared.values())
        )
        self.layouts = dict(layouts)
        self.cells: dict[str, Cells] = {}
        self._staged: dict[str, torch.Tensor] = {}
        for name, tensor in canonical.items():
            if is_host_view(tensor) and name not in staged:
                self.cells[name] = cells_of(tensor)
                continue
            self._staged[name] = tensor
            self.cells[name] = (
                cells_of(tensor).copy() if read else np.empty(layouts[name].cells, layouts[name].dtype.cells)
            )
        # names that the publisher has tied and this model has not: they get the same contents
        self._mirrors = [
            (entries[alias].detach(), name)
            for alias, name in aliases.items()
            if entries[alias].data_ptr() != canonical[name].data_ptr()
            or entries[alias].stride() != canonical[name].stride()
        ]

    @property
    def staged(self) -> Set[str]:
        """Names of tensors whose cells are copies."""
        return self._staged.keys()

    def commit(self, touched: Mapping[str, npt.NDArray[np.int64] | None] | None = None) -> None:
        """Write staged cells to their tensors. Views need nothing: they are the tensors.

        ``touched`` gives the positions that changed, where they are known: only those are sent to a device.
        """
        with torch.no_grad():
            for name, tensor in self._staged.items():
                where = (touched or {}).get(name)
                if where is not None and tensor.is_contiguous() and where.size < tensor.numel() // 8:
                    scatter_(tensor, where, self.cells[name][where])
                else:
                    self._copy(tensor, name)
            for tensor, name in self._mirrors:
                self._copy(tensor, name)
            for name, tensor in self._staged.items():
                if not np.array_equal(cells_of(tensor), self.cells[name]):
                    raise RebaseError(
                        f"tensor {name!r} shares its memory with another tensor that this version sets differently; "
                        "untie them before loading",
                        tensor=name,
                    )

    def _copy(self, tensor: torch.Tensor, name: str) -> None:
        layout = self.layouts[name]
        tensor.copy_(tensor_of(self.cells[name], layout.dtype.name, layout.shape))

    def write(self, cells: Mapping[str, Cells]) -> None:
        """Overwrite everything with ``cells``."""
        for name, mine in self.cells.items():
            mine[:] = cells[name]
        self.commit()


def _check(entries: Mapping[str, object], layouts: Mapping[str, Layout], aliases: Mapping[str, str]) -> None:
    wanted = set(layouts) | set(aliases)
    missing, unexpected = sorted(wanted - set(entries)), sorted(set(entries) - wanted)
    if missing or unexpected:
        raise MisuseError(
            f"the model is not of the published kind: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} are not published {unexpected[:3]}",
            missing=missing,
            unexpected=unexpected,
        )
    for name in wanted:
        tensor, layout = entries[name], layouts[aliases.get(name, name)]
        if not isinstance(tensor, torch.Tensor):
            raise MisuseError(f"state dict entry {name!r} is not a tensor")
        actual = Layout(dtype_of_tensor(tensor), shape_of(tensor))
        if actual != layout:
            raise MisuseError(
                f"{name!r} is published as {layout.dtype.name} {layout.shape}, the model has {actual.dtype.name} "
                f"{actual.shape}; convert the model first, for example model.to(torch.bfloat16)",
                tensor=name,
            )

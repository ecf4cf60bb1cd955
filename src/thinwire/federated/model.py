"""A model as both sides of a federation hold it: named tensors in their own data types, and the flat update over them.

The *flat update* is one float32 vector over all floating-point tensors (float64, float32, float16, bfloat16), in the
order of the layout. Other tensors (counters, masks) have no update: they travel whole where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.errors import MalformedError, MisuseError, WrongBaseError
from thinwire.tensors.bits import cells_of, dtype_of_tensor, shape_of, tensor_of
from thinwire.wire import canonical
from thinwire.wire.digests import check_name, check_shape, hasher
from thinwire.wire.spec import TENSORS_MAX, cell_count, dtype_of

__all__ = ["DIGEST_BYTES", "LAYOUT_BYTES_MAX", "ModelLayout", "ModelState", "is_finite"]

DIGEST_BYTES = 16
LAYOUT_BYTES_MAX = 16 << 20
NUMEL_MAX = 2**31 - 1
_UPDATED = ("F64", "F32", "F16", "BF16")
_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; types that torch cannot ask (8 bits and less) are let pass."""
    asked = tensor.is_floating_point() and tensor.element_size() > 1
    return not asked or bool(tensor.isfinite().all())


@final
@dataclass(frozen=True)
class ModelLayout:
    """Names, safetensors data types and shapes of a model's tensors, in their order."""

    rows: tuple[tuple[str, str, tuple[int, ...]], ...]

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """Cells of each tensor."""
        return tuple(cell_count(dtype_of(dtype), shape) for _, dtype, shape in self.rows)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(n * dtype_of(row[1]).cell_bytes for n, row in zip(self.cells, self.rows, strict=True))

    @cached_property
    def updated(self) -> tuple[int, ...]:
        """Indices of the tensors that the flat update covers."""
        return tuple(i for i, (_, dtype, _) in enumerate(self.rows) if dtype in _UPDATED)

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each of :attr:`updated`."""
        return tuple(prod(self.rows[i][2]) for i in self.updated)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each of :attr:`updated` begins in the flat update, and behind them its end."""
        return tuple(accumulate(self.numels, initial=0))

    @property
    def numel(self) -> int:
        """Elements of the flat update."""
        return self.offsets[-1]

    def encode(self) -> bytes:
        """Canonical JSON: ``[[name, dtype, shape], ...]``."""
        return canonical.dump([[name, dtype, list(shape)] for name, dtype, shape in self.rows])

    @classmethod
    def parse(cls, data: bytes) -> ModelLayout:
        """Inverse of :meth:`encode`, for bytes from anywhere.

        Raises:
            MalformedError: not such bytes, a name twice, or beyond the format's bounds.
            UnsupportedError: an unknown data type.
        """
        value = canonical.parse(data, bytes_max=LAYOUT_BYTES_MAX)
        if not isinstance(value, list) or len(value) > TENSORS_MAX:
            raise MalformedError("a layout is a list of rows")
        rows = []
        for row in value:
            if not isinstance(row, list) or len(row) != 3:
                raise MalformedError("a layout's row is not [name, dtype, shape]")
            rows.append((check_name(row[0]), dtype_of(row[1]).name, check_shape(row[2])))
            cell_count(dtype_of(row[1]), rows[-1][2])
        layout = cls(tuple(rows))
        if len({name for name, _, _ in rows}) != len(rows) or layout.numel > NUMEL_MAX:
            raise MalformedError("a layout names a tensor twice, or has more elements than positions can count")
        return layout


@final
class ModelState:
    """Tensors of one layout, never written after it is made; ``digest`` names their exact bits.

    >>> state = ModelState.of({"w": torch.tensor([1.0, -0.0]), "steps": torch.tensor(3)})
    >>> state.layout.numel, len(state.digest)
    (2, 16)
    >>> state.digest == ModelState.of({"w": torch.tensor([1.0, 0.0]), "steps": torch.tensor(3)}).digest
    False
    """

    __slots__ = ("__dict__", "layout", "tensors")

    def __init__(self, layout: ModelLayout, tensors: tuple[Tensor, ...]) -> None:
        self.layout = layout
        self.tensors = tensors

    @classmethod
    def of(cls, state: Mapping[str, Tensor | npt.NDArray[Any]]) -> ModelState:
        """A copy of a state dict of torch tensors or NumPy arrays, on the host.

        Raises:
            MisuseError: an entry is no tensor, has a name that cannot travel, or there are too many elements.
            UnsupportedError: a data type that safetensors lacks.
        """
        rows, tensors = [], []
        for name, value in state.items():
            try:
                check_name(name)
                tensor = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
                tensor = tensor.detach().to("cpu", copy=True).contiguous()
            except (MalformedError, AttributeError, TypeError, ValueError) as error:
                raise MisuseError(f"{str(name)[:80]!r} cannot travel: {error}", name=name) from error
            rows.append((name, dtype_of_tensor(tensor).name, shape_of(tensor)))
            tensors.append(tensor)
        layout = ModelLayout(tuple(rows))
        if layout.numel > NUMEL_MAX:
            raise MisuseError(f"{layout.numel} elements; an update has at most {NUMEL_MAX}", numel=layout.numel)
        return cls(layout, tuple(tensors))

    @classmethod
    def from_bytes(cls, layout: ModelLayout, data: memoryview | bytes) -> ModelState:
        """From the cells of all tensors, one behind the other.

        Raises:
            MalformedError: another number of bytes than the layout has.
        """
        if len(data) != layout.nbytes:
            raise MalformedError(f"{len(data)} bytes of tensors where the layout has {layout.nbytes}")
        tensors, at = [], 0
        for (_, dtype, shape), count in zip(layout.rows, layout.cells, strict=True):
            kind = dtype_of(dtype)
            cells = np.frombuffer(data, kind.cells, count, at).copy() if count else np.empty(0, kind.cells)
            tensors.append(tensor_of(cells, dtype, shape).clone())
            at += count * kind.cell_bytes
        return cls(layout, tuple(tensors))

    def to_bytes(self) -> bytes:
        """The cells of all tensors, one behind the other."""
        return b"".join(cells_of(tensor).tobytes() for tensor in self.tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors by name."""
        return {name: tensor.clone() for (name, _, _), tensor in zip(self.layout.rows, self.tensors, strict=True)}

    @cached_property
    def digest(self) -> bytes:
        """The first 16 bytes of BLAKE3 over layout and cells."""
        h = hasher("blake3")(b"thinwire federated v1\n" + self.layout.encode() + b"\n")
        for tensor in self.tensors:
            cells = cells_of(tensor)
            h.update(cells.data.cast("B") if cells.size else b"")
        return h.digest()[:DIGEST_BYTES]

    def minus(self, base: ModelState) -> Tensor:
        """The flat update float32 ``[numel]`` that leads from ``base`` here, whichever floating-point types tensors
        come in (Flower's FedAdam answers float32 by float64); 0 for tensors that are no such numbers any more.

        Raises:
            WrongBaseError: another order, other names or shapes.
        """
        self.check_comparable(base)
        parts = [torch.zeros(0)]
        for i, numel in zip(base.layout.updated, base.layout.numels, strict=True):
            new, old = self.tensors[i], base.tensors[i]
            if new.dtype not in _NUMBERS:
                parts.append(torch.zeros(numel))
                continue
            wide = torch.float64 if torch.float64 in (new.dtype, old.dtype) else torch.float32
            parts.append((new.to(wide) - old.to(wide)).reshape(-1).float())
        return torch.cat(parts)

    def check_comparable(self, base: ModelState) -> None:
        """Raises WrongBaseError unless names, their order and shapes are those of ``base``."""
        mine = [(name, shape) for name, _, shape in self.layout.rows]
        its = [(name, shape) for name, _, shape in base.layout.rows]
        if mine != its:
            odd = [a for a, b in zip(mine, its, strict=False) if a != b] or [(f"{len(mine)} tensors", ())]
            raise WrongBaseError(
                f"tensors differ from those of the base, first {odd[0][0][:80]!r} {odd[0][1]}; "
                "return the arrays that came, with their names, order and shapes",
                expected=len(its),
                actual=len(mine),
            )

    def plus(self, positions: Tensor, values: Tensor) -> ModelState:
        """This state with ``values`` float32 ``[k]`` added at flat ``positions`` int32 ``[k]``, rounded once to each
        tensor's data type. Both sides call this, and so come to the same bits."""
        tensors = list(self.tensors)
        cuts = torch.searchsorted(positions, torch.tensor(self.layout.offsets, dtype=torch.int32)).tolist()
        for i, start, first, last in zip(
            self.layout.updated, self.layout.offsets[:-1], cuts[:-1], cuts[1:], strict=True
        ):
            if first == last:
                continue
            tensor = tensors[i].clone()
            flat, at = tensor.view(-1), positions[first:last].long() - start
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            flat[at] = (flat[at].to(wide) + values[first:last].to(wide)).to(tensor.dtype)
            tensors[i] = tensor
        return ModelState(self.layout, tuple(tensors))

    def replaced(self, whole: Mapping[int, Tensor]) -> ModelState:
        """This state with some tensors, by index, replaced."""
        tensors = tuple(whole.get(i, tensor) for i, tensor in enumerate(self.tensors))
        rows = tuple(
            (name, dtype_of_tensor(tensor).name if i in whole else dtype, shape)
            for i, ((name, dtype, shape), tensor) in enumerate(zip(self.layout.rows, tensors, strict=True))
        )
        return ModelState(ModelLayout(rows), tensors)

    def whole_since(self, base: ModelState) -> dict[int, Tensor]:
        """Tensors that no flat update reaches (integers, numbers that were none before) and that differ."""
        self.check_comparable(base)
        found: dict[int, Tensor] = {}
        for i, (new, old) in enumerate(zip(self.tensors, base.tensors, strict=True)):
            if i in base.layout.updated and new.dtype in _NUMBERS:
                continue
            if new.dtype != old.dtype or not np.array_equal(cells_of(new), cells_of(old)):
                found[i] = new
        return found

"""The weights that benchmarks work on: a bf16 model whose cells lie in one array, and two versions of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from thinwire.errors import MisuseError
from thinwire.sync.layout import Layout
from thinwire.wire.spec import DTYPES

__all__ = ["STRIPE", "Cells", "Pair", "layouts_of", "model_shapes", "parts_of"]

Cells = npt.NDArray[np.uint16]
Shapes = Mapping[str, tuple[int, ...]]

STRIPE = 1 << 25
"""Cells that a codec which pools tensors takes at once, thinwire and its peers alike."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A version of a model and the one after it; both arrays hold the tensors of ``shapes`` one after another.

    ``workload`` names where they come from; ``facts`` are the figures that describe it (learning rate, steps).
    """

    workload: str
    shapes: Shapes
    old: Cells
    new: Cells
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of one version."""
        return self.new.nbytes


def model_shapes(cells: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder-only transformer with ``cells`` weights in all, names in increasing order.

    The width is the largest power of two that leaves at least eight layers; what is left over is the embedding.

    >>> shapes = model_shapes(1 << 20)
    >>> sum(int(np.prod(s)) for s in shapes.values()) == 1 << 20, len(shapes)
    (True, 127)
    """
    if cells < 1 << 10:
        raise MisuseError(f"a model of {cells} weights is too small to measure; take at least 2KiB")
    width = 4
    while 17 * (2 * width) ** 2 * 8 <= cells and width < 2048:
        width *= 2
    layer = {
        "attention.key": (width, width),
        "attention.norm": (width,),
        "attention.output": (width, width),
        "attention.query": (width, width),
        "attention.value": (width, width),
        "mlp.down": (width, 4 * width),
        "mlp.gate": (4 * width, width),
        "mlp.norm": (width,),
        "mlp.up": (4 * width, width),
    }
    each = sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(cells * 15 // 16 // each, 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for k in range(layers):
        for name, shape in layer.items():
            shapes[f"layers.{k:04d}.{name}"] = shape
    left = cells - layers * each
    rows = left // width
    if rows:
        shapes["tokens"] = (rows, width)
    if left % width:
        shapes["tokens.rest"] = (left % width,)
    return dict(sorted(shapes.items()))


def parts_of(flat: Cells, shapes: Shapes) -> dict[str, Cells]:
    """Views of the tensors."""
    parts: dict[str, Cells] = {}
    at = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        parts[name] = flat[at : at + size]
        at += size
    if at != flat.size:
        raise MisuseError(f"the shapes hold {at} cells, the array {flat.size}")
    return parts


def layouts_of(shapes: Shapes) -> dict[str, Layout]:
    """The tensors' layouts, as thinwire takes them."""
    return {name: Layout(DTYPES["BF16"], shape) for name, shape in shapes.items()}

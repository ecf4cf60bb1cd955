"""The readable versions of the comparisons: plain Python, no speed. The tests require equality."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from thinwire.probe.changes import Changes, Limits
from thinwire.tensors.bits import cells_of, dtype_of_tensor
from thinwire.tensors.oracle import ordered

__all__ = ["byte_of_cell", "compare_slowly", "ulp_bin"]


def ulp_bin(distance: int) -> int:
    """The bin of a ULP distance: 0, 1, 2, 3-4, 5-8, ...

    >>> [ulp_bin(d) for d in (0, 1, 2, 3, 4, 5, 8, 9)]
    [0, 1, 2, 3, 3, 4, 4, 5]
    """
    return distance if distance < 2 else (distance - 1).bit_length() + 1


def compare_slowly(old: Tensor, new: Tensor, limits: Limits = Limits()) -> Changes:  # noqa: B008
    """As :func:`thinwire.probe.changes.compare`."""
    if new.is_complex():
        old, new = torch.view_as_real(old), torch.view_as_real(new)
    dtype = dtype_of_tensor(new)
    signed = dtype.is_float or dtype.name.startswith("I")
    pairs = zip(
        cells_of(old).tolist(), cells_of(new).tolist(),
        old.reshape(-1).tolist(), new.reshape(-1).tolist(), strict=True,
    )  # fmt: skip
    bins, counts, steps, weights = Counter[int](), Counter[str](), [], []
    for a, b, x, y in pairs:
        weights.append(float(y) if math.isfinite(y) else 0.0)
        if a == b:
            continue
        if signed:
            bits = 8 * dtype.cell_bytes
            distance = abs(ordered(b, bits, is_float=dtype.is_float) - ordered(a, bits, is_float=dtype.is_float))
        else:
            distance = abs(b - a)
        bins[ulp_bin(distance)] += 1
        step = float(y) - float(x)
        above = distance > limits.ulps
        if limits.absolute:
            above = above and not abs(step) <= limits.absolute
        if limits.relative:
            above = above and not abs(step) <= limits.relative * abs(float(x))
        counts["changed"] += 1
        counts["above"] += above
        counts["new_nan"] += math.isnan(y) and not math.isnan(x)
        counts["new_inf"] += math.isinf(y) and not math.isinf(x)
        if math.isfinite(step):
            steps.append(step)
        else:
            counts["odd"] += 1
    return Changes(
        elements=new.numel(),
        **counts,
        total=sum(steps),
        total_abs=sum(map(abs, steps)),
        squares=sum(step * step for step in steps),
        max_abs=max(map(abs, steps), default=0.0),
        weight_squares=sum(weight * weight for weight in weights),
        ulps=tuple(bins[k] for k in range(max(bins, default=-1) + 1)),
    )


def byte_of_cell(cell: int, cell_bytes: int, *, is_float: bool) -> int:
    """The byte that a fast comparison keeps of a cell: all of 8 bits, the low byte in numeric order of 16 bits, a hash
    of more."""
    if cell_bytes == 1:
        return cell
    if cell_bytes == 2:
        return ordered(cell, 16, is_float=is_float) & 0xFF
    mixed = (cell ^ cell >> 32) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ mixed >> shift) * factor & 0xFFFFFFFF
    return (mixed ^ mixed >> 16) & 0xFF

"""The comparison of :mod:`thinwire.probe.changes` in torch, for devices other than the CPU.

Equal to the kernels but for the order in which differences are summed.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.tensors.bits import dtype_of_tensor

__all__ = ["byte_of", "compare_on_device", "follow_on_device"]

_BLOCK = 1 << 22  # elements
_CELLS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Limits(Protocol):
    """As :class:`thinwire.probe.changes.Limits`."""

    @property
    def absolute(self) -> float: ...
    @property
    def relative(self) -> float: ...
    @property
    def ulps(self) -> int: ...


def _cells(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(_CELLS[tensor.element_size()])


def _ulp_bins(before: Tensor, after: Tensor, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Bins of the ULP distances of differing cells, and the distances in float64 (exact below 2^53)."""
    dtype = dtype_of_tensor(tensor)
    if dtype.name in ("U8", "BOOL", "U16", "U32"):
        low = (1 << 8 * dtype.cell_bytes) - 1
        a, b = before.long() & low, after.long() & low
    else:
        a, b = before.long(), after.long()
        if dtype.cell_bytes == 1:  # cells of one byte come unsigned
            a, b = (a ^ 0x80) - 0x80, (b ^ 0x80) - 0x80
        if dtype.is_float:
            flip = (1 << (8 * dtype.cell_bytes - 1)) - 1
            a, b = a ^ ((a >> 63) & flip), b ^ ((b >> 63) & flip)
    if dtype.name == "U64":
        a, b = a ^ (-1 << 63), b ^ (-1 << 63)  # in order as signed numbers
    distance = torch.where(b > a, b - a, a - b)  # modulo 2^64: a negative number stands for 2^63 and more
    rest = distance - 1
    bins = torch.ones_like(rest)
    for shift in (32, 16, 8, 4, 2, 1):
        high = (rest >> shift) > 0
        bins += torch.where(high, shift, 0)
        rest = torch.where(high, rest >> shift, rest)
    bins += (rest > 0).long()
    wrapped = (distance - 1) < 0
    bins = torch.where(wrapped, 65, bins)
    sizes = torch.where(distance < 0, distance.double() + 2.0**64, distance.double())
    return bins, sizes


def _pack(mask: Tensor, words: npt.NDArray[np.uint64], start: int) -> None:
    packed = np.packbits(mask.cpu().numpy(), bitorder="little")
    words.view(np.uint8)[start // 8 : start // 8 + packed.size] = packed


def compare_on_device(
    old: Tensor, new: Tensor, limits: Limits, *, renew: bool, words: npt.NDArray[np.uint64]
) -> dict[str, Any]:
    """The fields of a ``Changes`` for contiguous tensors of one data type, shape and device."""
    found: dict[str, Any] = dict.fromkeys(("changed", "above", "odd", "new_nan", "new_inf"), 0)
    found |= dict.fromkeys(("total", "total_abs", "squares", "max_abs", "weight_squares"), 0.0)
    hist = torch.zeros(66, dtype=torch.int64)
    if words.size:
        words[:] = 0
    old_cells, new_cells, x, y = _cells(old), _cells(new), old.reshape(-1), new.reshape(-1)
    for start in range(0, new.numel(), _BLOCK):
        part = slice(start, start + _BLOCK)
        differ = old_cells[part] != new_cells[part]
        if words.size:
            _pack(differ, words, start)
        values = y[part].double()
        found["weight_squares"] += float(torch.where(values.isfinite(), values, 0.0).square().sum())
        where = differ.nonzero().view(-1)
        a, b = x[part][where].double(), values[where]
        step = b - a
        size = step.abs()
        bins, distance = _ulp_bins(old_cells[part][where], new_cells[part][where], new)
        hist += torch.bincount(bins, minlength=66).cpu()
        above = distance > limits.ulps
        if limits.absolute:
            above &= ~(size <= limits.absolute)
        if limits.relative:
            above &= ~(size <= limits.relative * a.abs())
        finite = step.isfinite()
        found["changed"] += len(where)
        found["above"] += int(above.sum())
        found["odd"] += int((~finite).sum())
        found["new_nan"] += int((b.isnan() & ~a.isnan()).sum())
        found["new_inf"] += int((b.isinf() & ~a.isinf()).sum())
        step, size = step[finite], size[finite]
        found["total"] += float(step.sum())
        found["total_abs"] += float(size.sum())
        found["squares"] += float(step.square().sum())
        found["max_abs"] = max(found["max_abs"], float(size.max()) if len(size) else 0.0)
        if renew:
            old_cells[part] = new_cells[part]
    ulps = tuple(np.trim_zeros(hist.numpy(), "b").tolist())
    return {"elements": new.numel(), **found, "ulps": ulps}


def byte_of(tensor: Tensor) -> Tensor:
    """The byte [n, uint8] that a fast comparison keeps of each cell of a contiguous tensor."""
    cells = _cells(tensor)
    if cells.dtype == torch.uint8:
        return cells
    if cells.dtype == torch.int16:
        if dtype_of_tensor(tensor).is_float:
            cells = cells ^ (cells >> 15)
        return (cells & 0xFF).to(torch.uint8)
    if cells.dtype == torch.int64:
        folded = cells ^ ((cells >> 32) & 0xFFFFFFFF)
    else:
        folded = cells.long()
    folded = folded & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finaliser (Appleby 2011)
        folded = ((folded ^ (folded >> shift)) * factor) & 0xFFFFFFFF
    return ((folded ^ (folded >> 16)) & 0xFF).to(torch.uint8)


def follow_on_device(
    tensor: Tensor, kept: Tensor, hist: npt.NDArray[np.int64], words: npt.NDArray[np.uint64], *, renew: bool
) -> int:
    """As :func:`thinwire.probe.change_kernels.follow_bytes`, for a contiguous tensor and ``kept`` [n, uint8]."""
    changed, flat = 0, tensor.reshape(-1)
    if words.size:
        words[:] = 0
    for start in range(0, flat.numel(), _BLOCK):
        part = slice(start, start + _BLOCK)
        fresh = byte_of(flat[part])
        differ = fresh != kept[part]
        if words.size:
            _pack(differ, words, start)
        changed += int(differ.sum())
        if tensor.element_size() == 2:
            step = (fresh[differ] - kept[part][differ]).view(torch.int8).long().abs()
            bins = 1 + (step.view(-1, 1) > 2 ** torch.arange(8, device=step.device)).sum(dim=1)
            hist += torch.bincount(bins, minlength=66).cpu().numpy()
        if renew:
            kept[part] = fresh
    return changed

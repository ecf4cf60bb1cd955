"""What changed between two states of a tensor: how many elements, by how much, by how many ULPs.

*Changed* is decided on bits, as everywhere in thinwire: -0.0 against 0.0 is a change (by one ULP, of 0.0), and so is
one NaN against another. An element is *above* the limits if it changed and its difference is beyond each of them. The
ULP distance of two floats counts the representable numbers from one to the other (:mod:`thinwire.wire.values`).

All results are sums, so those of tensors, layers and shards add up: ``compare(a, b) + compare(c, d)``.

>>> old = torch.tensor([1.0, 2.0, -0.0, 4.0], dtype=torch.bfloat16)
>>> new = torch.tensor([1.0, 2.5, 0.0, 4.0], dtype=torch.bfloat16)
>>> found = compare(old, new)
>>> found.changed, found.sparsity, found.max_abs, found.ulps[1]
(2, 0.5, 0.5, 1)
>>> compare(old, new, Limits(absolute=0.1)).above
1
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from itertools import zip_longest
from math import inf, isnan, nan, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.errors import MisuseError, UnsupportedError
from thinwire.probe.change_kernels import (
    BINS,
    COUNTS,
    MAX_ABS,
    compare_narrow,
    compare_wide,
    squares_bf16,
    squares_wide,
)
from thinwire.probe.change_torch import compare_on_device
from thinwire.tensors.bits import cells_of, dtype_of_tensor, is_host_view, tensor_of
from thinwire.wire.spec import DType
from thinwire.wire.values import flip_mask

__all__ = [
    "BLOCK",
    "NO_LIMITS",
    "NO_WORDS",
    "Changes",
    "Limits",
    "compare",
    "compare_blocks",
    "plain_tensor",
    "ulp_bin_label",
]

Words = npt.NDArray[np.uint64]

BLOCK = 1 << 18
"""Elements that are compared, and converted where a view asks for it, at a time: they stay in the cache."""

NO_WORDS: Words = np.empty(0, np.uint64)

_NUMPY = {"F32": np.float32, "F64": np.float64, "C64": np.float32}
_UNSUPPORTED = ("F4", "F8_E8M0")  # two numbers a byte; powers of two alone


@dataclass(frozen=True, slots=True)
class Limits:
    """What a change must exceed to count as one: ``|new - old| > absolute``, ``|new - old| > relative * |old|``, more
    than ``ulps`` ULPs; all of those that are not 0.

    >>> Limits(relative=-1.0)
    Traceback (most recent call last):
        ...
    thinwire.errors.MisuseError: relative=-1.0; give a finite number of at least 0
    """

    absolute: float = 0.0
    relative: float = 0.0
    ulps: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < inf:
                raise MisuseError(f"{field.name}={value}; give a finite number of at least 0")

    @property
    def none(self) -> bool:
        """Whether every change counts."""
        return not (self.absolute or self.relative or self.ulps)


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Changes:
    """Sums over the elements of tensors that were compared; all differences in float64.

    Attributes:
        elements: compared (a complex number is two).
        changed: those of which any bit differs.
        above: those whose change is beyond all limits; all that changed where there are none.
        missed: changes that a fast comparison is expected to have overlooked, to be added to ``above``.
        odd: changed elements whose difference is not finite; they are left out of the following sums.
        new_nan: elements that became NaN. new_inf: elements that became infinite.
        total, total_abs, squares: sums of the differences, of their magnitudes, of their squares.
        max_abs: the largest magnitude of a difference.
        weight_squares: the sum of squares of all finite new values.
        ulps: changed elements by ULP distance: 0, 1, 2, 3-4, 5-8, ... (:func:`ulp_bin_label`); without trailing zeros.

    A fast comparison does not know differences: the sums are then NaN, and so is what they are added to.
    """

    elements: int = 0
    changed: int = 0
    above: int = 0
    missed: float = 0.0
    odd: int = 0
    new_nan: int = 0
    new_inf: int = 0
    total: float = 0.0
    total_abs: float = 0.0
    squares: float = 0.0
    max_abs: float = 0.0
    weight_squares: float = 0.0
    ulps: tuple[int, ...] = ()

    def __add__(self, other: Changes) -> Changes:
        a, b = self.max_abs, other.max_abs
        return Changes(
            self.elements + other.elements,
            self.changed + other.changed,
            self.above + other.above,
            self.missed + other.missed,
            self.odd + other.odd,
            self.new_nan + other.new_nan,
            self.new_inf + other.new_inf,
            self.total + other.total,
            self.total_abs + other.total_abs,
            self.squares + other.squares,
            nan if isnan(a) or isnan(b) else max(a, b),
            self.weight_squares + other.weight_squares,
            tuple(x + y for x, y in zip_longest(self.ulps, other.ulps, fillvalue=0)),
        )

    @property
    def density(self) -> float:
        """The share of elements above the limits, in [0, 1]; 0 of no elements."""
        return min(1.0, (self.above + self.missed) / self.elements) if self.elements else 0.0

    @property
    def sparsity(self) -> float:
        """The share of elements that did not change, or not by more than the limits."""
        return 1.0 - self.density

    @property
    def mean(self) -> float:
        """Mean difference of the changed elements; 0 of none."""
        return self._over_changed(self.total)

    @property
    def mean_abs(self) -> float:
        """Mean magnitude of the difference of the changed elements; 0 of none."""
        return self._over_changed(self.total_abs)

    @property
    def std(self) -> float:
        """Standard deviation (population) of the changed elements' differences."""
        return sqrt(max(0.0, self._over_changed(self.squares) - self.mean**2)) if not isnan(self.squares) else nan

    @property
    def std_abs(self) -> float:
        """Standard deviation (population) of the magnitudes of the changed elements' differences."""
        return sqrt(max(0.0, self._over_changed(self.squares) - self.mean_abs**2)) if not isnan(self.squares) else nan

    @property
    def update_ratio(self) -> float:
        """Norm of the difference over the norm of the new values; infinite where only the former is not 0."""
        if not self.weight_squares:
            return inf if self.squares else self.squares
        return sqrt(self.squares / self.weight_squares)

    def _over_changed(self, total: float) -> float:
        finite = self.changed - self.odd
        return total / finite if finite else 0.0 * total


def ulp_bin_label(index: int) -> str:
    """The ULP distances that a bin of ``Changes.ulps`` counts.

    >>> [ulp_bin_label(k) for k in range(6)]
    ['0', '1', '2', '3-4', '5-8', '9-16']
    """
    return str(index) if index < 3 else f"{2 ** (index - 2) + 1}-{2 ** (index - 1)}"


def plain_tensor(tensor: Tensor) -> Tensor:
    """What is measured of a tensor: this rank's shard of a DTensor, the parts of complex numbers, without a graph.

    Raises:
        MisuseError: a sparse or meta tensor.
        UnsupportedError: a data type without numbers that can be compared.
    """
    plain = tensor.detach()
    if hasattr(plain, "to_local"):
        plain = plain.to_local()
    if plain.layout is not torch.strided or plain.device.type == "meta":
        raise MisuseError(f"a {plain.layout} tensor on {plain.device} has no plain memory to compare")
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    if dtype_of_tensor(plain).name in _UNSUPPORTED:
        raise UnsupportedError(f"{plain.dtype} has no numbers to compare; unpack it first")
    return plain.resolve_neg().contiguous()


@cache
def _table(name: str) -> npt.NDArray[np.float32]:
    """The numbers of all cells of a data type of 8 or 16 bits."""
    bits = 16 if name in ("BF16", "F16", "I16", "U16") else 8
    cells = np.arange(1 << bits, dtype=np.uint32).astype(f"u{bits // 8}")
    found: npt.NDArray[np.float32]
    if name == "BOOL":  # any byte is a bool, and all but 0 are true
        found = (cells != 0).astype(np.float32)
    else:
        found = tensor_of(cells, name, (cells.size,)).to(torch.float32).numpy()
    return found


def _number_type(dtype: DType) -> Any:
    return _NUMPY.get(dtype.name) or np.dtype(f"{dtype.name[0].lower()}{dtype.cell_bytes}")


def _weight_squares(cells: Any, dtype: DType) -> float:
    if dtype.name == "BF16":
        return float(squares_bf16(cells))
    if cells.itemsize <= 2:
        return float(squares_wide(_table(dtype.name)[cells]))
    return float(squares_wide(cells.view(_number_type(dtype))))


def _compare_on_host(old: Tensor, new: Tensor, limits: Limits, renew: bool, words: Words) -> Changes:
    dtype = dtype_of_tensor(new)
    signed = dtype.is_float or dtype.name.startswith("I")
    rules = (
        flip_mask(dtype.is_float, dtype.cell_bytes), 64 - 8 * dtype.cell_bytes, signed,
        np.array([limits.absolute, limits.relative]), np.uint64(limits.ulps), renew,
    )  # fmt: skip
    before, after = cells_of(old), cells_of(new)
    counts, sums, hist = np.zeros(COUNTS, np.int64), np.zeros(MAX_ABS + 1), np.zeros(BINS, np.int64)
    squares = 0.0
    for start in range(0, after.size, BLOCK):
        part = slice(start, start + BLOCK)
        a, b = before[part], after[part]
        marks = words[start // 64 : -(-(start + a.size) // 64)] if words.size else words
        if dtype.cell_bytes <= 2:
            compare_narrow(a, b, _table(dtype.name), rules, counts, sums, hist, marks)
        else:
            compare_wide(a, b, _number_type(dtype), rules, counts, sums, hist, marks)
        squares += _weight_squares(b, dtype)
    changed, above, odd, new_nan, new_inf = (int(count) for count in counts)
    total, total_abs, total_squares, largest = (float(value) for value in sums)
    ulps = tuple(int(count) for count in np.trim_zeros(hist, "b"))
    return Changes(
        after.size, changed, above, 0.0, odd, new_nan, new_inf, total, total_abs, total_squares, largest, squares, ulps
    )


def compare(
    old: Tensor, new: Tensor, limits: Limits = NO_LIMITS, *, renew: bool = False, words: Words = NO_WORDS
) -> Changes:  # fmt: skip
    """What changed from ``old`` to ``new``: tensors of one data type, shape and device.

    ``renew`` makes ``old``, which must then be contiguous, equal to ``new`` in the same pass. ``words``
    [ceil(elements / 64)] takes one bit an element, set where it changed. Memory beyond the two tensors follows the
    block, on devices other than the CPU the block and its changes.

    Raises:
        MisuseError: data types, shapes or devices differ; a sparse or meta tensor; words of another length.
        UnsupportedError: a data type without numbers that can be compared.
    """
    old_plain, new_plain = plain_tensor(old), plain_tensor(new)
    if (old_plain.dtype, old_plain.shape, old_plain.device) != (new_plain.dtype, new_plain.shape, new_plain.device):
        raise MisuseError(
            f"cannot compare {old_plain.dtype} {tuple(old_plain.shape)} on {old_plain.device} with {new_plain.dtype} "
            f"{tuple(new_plain.shape)} on {new_plain.device}; convert or move one of them first"
        )
    if words.size and words.size != -(-new_plain.numel() // 64):
        raise MisuseError(f"{new_plain.numel()} elements take {-(-new_plain.numel() // 64)} words, not {words.size}")
    if renew and old_plain.data_ptr() != old.detach().data_ptr() and old.numel():
        raise MisuseError("only a contiguous tensor can be renewed in place")
    return compare_blocks(old_plain, new_plain, limits, renew=renew, words=words)


def compare_blocks(old: Tensor, new: Tensor, limits: Limits, *, renew: bool, words: Words) -> Changes:
    """:func:`compare` for tensors that :func:`plain_tensor` has made."""
    if is_host_view(new):
        return _compare_on_host(old, new, limits, renew, words)
    return Changes(**compare_on_device(old, new, limits, renew=renew, words=words))

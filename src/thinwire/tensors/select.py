"""Exact selection of the largest magnitudes, the step that decides what a sparse gradient exchange sends.

The bits of ``|x|`` are compared as integers, and mostly a single pass over memory finds the answer. It is a function of
the values alone: ties at the threshold go to the lowest indices, and neither hints, threads nor the device change it.
NaN counts as larger than infinity; :attr:`Selection.finite` tells, at no extra cost, whether there was any of either.

On the CPU the loops are compiled by Numba, on CUDA by Triton (without Triton, torch's own operations stand in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import inf, isnan

import numpy as np
import torch

from thinwire.errors import MisuseError
from thinwire.tensors import select_torch

__all__ = ["Selection", "accumulate_top_k", "at_least", "fill_sparse_", "top_k"]

_NUMEL_MAX = 2**31 - 1
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Selection:
    """What was selected.

    Attributes:
        indices: int32 [k], strictly increasing, on the device of the values.
        threshold: the smallest magnitude selected, the hint for the next step; infinity if k is 0.
        finite: no value, selected or not, is infinite or NaN.
    """

    indices: torch.Tensor
    threshold: float
    finite: bool


def _check(name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> None:
    if x.dim() != 1 or not x.is_contiguous() or x.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise MisuseError(f"{name} must be a contiguous 1-d tensor of {wanted}, not {x.dtype} {tuple(x.shape)}")
    if x.device.type not in ("cpu", "cuda"):
        raise MisuseError(f"{name} is on {x.device}; selection runs on the CPU and on CUDA")
    if x.numel() > _NUMEL_MAX:
        raise MisuseError(f"{name} has {x.numel()} elements, more than int32 indices reach; select in parts")


def _check_k(k: int, numel: int) -> None:
    if not 0 <= k <= numel:
        raise MisuseError(f"k must be from 0 to the number of elements, {numel}, not {k}")


def _check_same(name: str, x: torch.Tensor, like: torch.Tensor) -> None:
    if x.numel() != like.numel() or x.device != like.device:
        raise MisuseError(
            f"{name} must have the other tensor's length and device, {like.numel()} on {like.device}, "
            f"not {x.numel()} on {x.device}"
        )


def _check_overlap(name: str, x: torch.Tensor, out: torch.Tensor) -> None:
    first, second = x.data_ptr(), out.data_ptr()
    mine, its = out.numel() * out.element_size(), x.numel() * x.element_size()
    apart = first >= second + mine or second >= first + its
    if not apart and (first != second or mine != its):
        raise MisuseError(f"{name} overlaps the output at another offset; it must be the same memory or apart")


def _threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise MisuseError(f"threads must be at least 1, not {threads}")
    return torch.get_num_threads() if threads is None else threads


def _selection(indices: torch.Tensor, key: int, finite: bool) -> Selection:
    return Selection(indices, float(np.uint32(key).view(np.float32)), finite)


def top_k(
    x: torch.Tensor,
    k: int | Sequence[int],
    *,
    hint: float | None = None,
    segments: Sequence[int] | None = None,
    threads: int | None = None,
) -> Selection:
    """The ``k`` largest magnitudes of ``x``, exactly.

    Args:
        x: float32 (or bfloat16, float16, which are converted) [n], contiguous, n < 2**31, on the CPU or on CUDA.
        k: how many, 0 to n.
        hint: about the threshold to expect, such as the last step's. Only the speed depends on it, on the CPU.
        segments: lengths of consecutive parts of ``x``, selected from one by one; ``k`` is then one count each, and
            the threshold the lowest of theirs. A hint does not fit them all and is left out.
        threads: on the CPU; by default torch's number.

    Raises:
        MisuseError: a dtype, shape, k, or segments that do not fit.

    >>> found = top_k(torch.tensor([0.5, -3.0, 2.0, -0.5]), 3)
    >>> found.indices.tolist(), found.threshold, found.finite
    ([0, 1, 2], 0.5, True)
    >>> top_k(torch.tensor([0.5, -3.0, 2.0, -0.5]), [1, 1], segments=[2, 2]).indices.tolist()
    [1, 2]
    """
    _check("x", x)
    if segments is not None:
        return _by_segments(x, k, segments, threads)
    if isinstance(k, Sequence):
        raise MisuseError("k must be one number unless there are segments")
    _check_k(k, x.numel())
    x = x.detach()
    if x.device.type == "cuda":
        return _selection(*_device_top_k(x, k))
    from thinwire.tensors import select_stripes

    found = select_stripes.top_k(x.float().numpy(), k, hint=hint, threads=_threads(threads))
    return _selection(torch.from_numpy(found.indices), found.key, found.finite)


def _by_segments(x: torch.Tensor, k: int | Sequence[int], segments: Sequence[int], threads: int | None) -> Selection:
    if (
        not isinstance(k, Sequence)
        or len(k) != len(segments)
        or sum(segments) != x.numel()
        or min(segments, default=0) < 0
    ):
        raise MisuseError(f"segments need one k each and must add up to {x.numel()} elements")
    indices, threshold, finite, offset = [], inf, True, 0
    for count, length in zip(k, segments, strict=True):
        found = top_k(x[offset : offset + length], count, threads=threads)
        indices.append(found.indices + offset)
        threshold, finite = min(threshold, found.threshold), finite and found.finite
        offset += length
    joined = torch.cat(indices) if indices else torch.empty(0, dtype=torch.int32, device=x.device)
    return Selection(joined, threshold, finite)


def accumulate_top_k(
    gradient: torch.Tensor,
    residual: torch.Tensor,
    k: int,
    *,
    hint: float | None = None,
    gradient_scale: float = 1.0,
    residual_scale: float = 1.0,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> Selection:
    """``residual = gradient_scale * gradient + residual_scale * residual`` and its :func:`top_k`, in one pass.

    The products are rounded to float32 before they are added. With ``out`` the sum goes there and ``residual`` stays.

    Args:
        gradient: float32 (or bfloat16, float16, which are converted) [n], contiguous.
        residual: float32 [n], contiguous.
        k, hint, threads: as for :func:`top_k`.
        gradient_scale, residual_scale: rounded to float32.
        out: float32 [n], contiguous; it may be ``residual`` or ``gradient`` but not overlap them at another offset.

    Raises:
        MisuseError: a dtype, shape or k that does not fit, or memory that overlaps.

    >>> residual = torch.tensor([0.5, 0.0, -1.0])
    >>> found = accumulate_top_k(torch.tensor([0.0, 4.0, 2.0]), residual, 1, gradient_scale=0.5)
    >>> residual.tolist(), found.indices.tolist(), found.threshold
    ([0.5, 2.0, 0.0], [1], 2.0)
    """
    out = residual if out is None else out
    _check("gradient", gradient)
    for name, x in (("residual", residual), ("out", out)):
        _check(name, x, (torch.float32,))
        _check_same(name, x, gradient)
    _check_k(k, out.numel())
    gradient, residual, out = gradient.detach(), residual.detach(), out.detach()
    _check_overlap("gradient", gradient, out)
    _check_overlap("residual", residual, out)
    if out.device.type == "cuda":
        return _selection(*_device_accumulate_top_k(gradient, residual, out, k, gradient_scale, residual_scale))
    from thinwire.tensors import select_stripes

    found = select_stripes.accumulate_top_k(
        gradient.float().numpy(), residual.numpy(), out.numpy(), k,
        hint=hint, scale=gradient_scale, keep=residual_scale, threads=_threads(threads),
    )  # fmt: skip
    return _selection(torch.from_numpy(found.indices), found.key, found.finite)


def at_least(x: torch.Tensor, threshold: float, *, cap: int | None = None, threads: int | None = None) -> torch.Tensor:
    """Sorted int32 indices of all magnitudes >= ``threshold``, NaN among them; of the ``cap`` largest if more are.

    Args:
        x: float32 (or bfloat16, float16, which are converted) [n], contiguous, n < 2**31.
        threshold: not negative and not NaN; rounded to float32.
        cap: at most so many.

    Raises:
        MisuseError: a dtype, shape or threshold that does not fit.

    >>> at_least(torch.tensor([0.5, -3.0, 2.0]), 2.0).tolist()
    [1, 2]
    """
    _check("x", x)
    if isnan(threshold) or threshold < 0:
        raise MisuseError(f"threshold must be a magnitude, not {threshold}")
    if cap is not None and cap < 0:
        raise MisuseError(f"cap must not be negative, as {cap} is")
    x = x.detach()
    if x.device.type == "cuda":
        return select_torch.at_least(x, threshold, cap)
    from thinwire.tensors import select_stripes

    return torch.from_numpy(select_stripes.at_least(x.float().numpy(), threshold, cap=cap, threads=_threads(threads)))


def fill_sparse_(
    out: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, *, threads: int | None = None
) -> torch.Tensor:
    """Zero ``out`` and write ``values`` at ``indices``, bit for bit, in one pass; returns ``out``.

    Args:
        out: float32 [n], contiguous.
        indices: int32 [k], strictly increasing.
        values: float32 [k], contiguous.

    Raises:
        MisuseError: dtypes or shapes that do not fit, or indices that do not increase strictly within ``out``.

    >>> fill_sparse_(torch.ones(4), torch.tensor([1, 3], dtype=torch.int32), torch.tensor([5.0, -0.0])).tolist()
    [0.0, 5.0, 0.0, -0.0]
    """
    _check("out", out, (torch.float32,))
    _check("indices", indices, (torch.int32,))
    _check("values", values, (torch.float32,))
    _check_same("values", values, indices)
    if indices.device != out.device:
        raise MisuseError(f"indices are on {indices.device}, out is on {out.device}")
    target, written = out.detach(), values.detach()
    if out.device.type == "cuda":
        fits = _device_fill(target, indices, written)
    else:
        from thinwire.tensors import select_stripes

        fits = select_stripes.fill_sparse(target.numpy(), indices.numpy(), written.numpy(), threads=_threads(threads))
    if not fits:
        raise MisuseError(f"indices must increase strictly from 0 to below {out.numel()}")
    return out


# --- CUDA -------------------------------------------------------------------------------------------------------------


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _device_top_k(x: torch.Tensor, k: int) -> select_torch.Found:
    if not _has_triton():
        return select_torch.top_k(x, k)
    from thinwire.tensors import select_triton

    return select_triton.top_k(x, k)


def _device_accumulate_top_k(
    gradient: torch.Tensor, residual: torch.Tensor, out: torch.Tensor, k: int, scale: float, keep: float
) -> select_torch.Found:
    if not _has_triton():
        return select_torch.top_k(select_torch.accumulate(gradient, residual, out, scale, keep), k)
    from thinwire.tensors import select_triton

    return select_triton.accumulate_top_k(gradient, residual, out, k, scale, keep)


def _device_fill(out: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> bool:
    if indices.numel():
        rising = (indices[1:] > indices[:-1]).all() & (indices[0] >= 0) & (indices[-1] < out.numel())
        if not bool(rising):  # the device itself would only stop the process
            return False
    out.zero_().index_put_((indices.long(),), values)
    return True

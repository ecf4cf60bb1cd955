# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The sparse step of AdamW on CUDA: gather, update and scatter in one launch, for each of a block of active cells.

Every operation is rounded as in :mod:`thinwire.optim.oracle`: sums of products in float64, square root and division to
the nearest, nothing fused. Torch's operations, which stand in without Triton, pass over ``k`` cells 17 times.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from thinwire.optim.oracle import AdamStep

__all__ = ["adam"]

_BLOCK = 1024


@triton.jit
def _fused(a, b, c):
    return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)


@triton.jit
def _to_bf16(x):
    """The bits of ``x`` in bfloat16, to nearest, ties to even; Triton's interpreter would cut off."""
    bits = x.to(tl.int32, bitcast=True)
    odd = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(odd, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def _adam(
    weights, positions, gradient, m, v, entered, masters, rates, corrections, numbers, now, oldest, count,
    MASTERS: tl.constexpr, BF16: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = j < count
    at = tl.load(positions + j, mask=inside, other=0).to(tl.int64)
    rest1, beta2, rest2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    eps, decay = tl.load(numbers + 3), tl.load(numbers + 4)
    age = tl.minimum(now - tl.load(entered + j, mask=inside, other=1) + 1, oldest)
    rate = tl.load(rates + age, mask=inside, other=0.0)
    below = tl.load(corrections + age, mask=inside, other=1.0)
    g = tl.load(gradient + j, mask=inside, other=0.0)
    if MAXIMIZE:
        g = -g
    old_m, old_v = tl.load(m + j, mask=inside, other=0.0), tl.load(v + j, mask=inside, other=0.0)
    if MASTERS:
        w = tl.load(masters + j, mask=inside, other=0.0)
    elif BF16:
        w = (tl.load(weights + at, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        w = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    new_m = _fused(rest1, g - old_m, old_m)
    new_v = _fused(rest2 * g, g, old_v * beta2)
    new_w = w * decay + tl.div_rn(-rate * new_m, tl.div_rn(tl.sqrt_rn(new_v), below) + eps)
    tl.store(m + j, new_m, mask=inside)
    tl.store(v + j, new_v, mask=inside)
    if BF16:
        tl.store(weights + at, _to_bf16(new_w), mask=inside)
    else:
        tl.store(weights + at, new_w.to(weights.dtype.element_ty), mask=inside)
    if MASTERS:
        tl.store(masters + j, new_w, mask=inside)


def adam(
    weights: torch.Tensor, positions: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor,
    entered: torch.Tensor, now: int, step: AdamStep, masters: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`thinwire.optim.oracle.adam`, to the same bits."""
    count = positions.numel()
    if count == 0:
        return
    numbers = torch.tensor([1 - step.beta1, step.beta2, 1 - step.beta2, step.eps, step.decay], dtype=torch.float32)
    numbers = numbers.to(weights.device)
    brief = weights.dtype == torch.bfloat16
    cells = weights.view(torch.int16) if brief else weights
    options: dict[str, Any] = {
        "MASTERS": masters is not None,
        "BF16": brief,
        "MAXIMIZE": step.maximize,
        "BLOCK": _BLOCK,
    }
    _adam[(triton.cdiv(count, _BLOCK),)](
        cells, positions, gradient, m, v, entered, m if masters is None else masters, step.rates, step.corrections,
        numbers, now, step.rates.numel() - 1, count, enable_fp_fusion=False, **options,
    )  # fmt: skip

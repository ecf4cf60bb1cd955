# mypy: disable-error-code="call-arg, no-untyped-call"
"""Sparse steps on any device: compiled by Numba on the CPU, torch's own operations elsewhere.

All give the bits of :mod:`thinwire.optim.oracle`. On the CPU the active cells are cut into stripes, a thread each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from thinwire.errors import MisuseError
from thinwire.optim import oracle
from thinwire.optim.oracle import AdamStep, SGDStep

__all__ = ["FLOATS", "absent", "adam", "adam_everywhere", "gather", "histogram", "importance", "merged", "sgd"]

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Data types of weights and gradients, and their numbers in :mod:`thinwire.optim.kernels_cpu`."""
_STRIPE_MIN = 1 << 16  # active cells for which another thread is worth its start
_STRIPE_DENSE = 1 << 22


def _cells(x: torch.Tensor) -> npt.NDArray[Any]:
    if x.dtype == torch.float32:
        return x.view(torch.int32).numpy().view(np.uint32)
    return x.view(torch.int16).numpy().view(np.uint16)


def _kind(x: torch.Tensor) -> int:
    if x.dtype not in FLOATS:
        raise MisuseError(f"sparse steps know float32, bfloat16 and float16, not {x.dtype}; convert the model")
    return FLOATS[x.dtype]


def _in_stripes(count: int, least: int, work: Callable[[slice], Any]) -> list[Any]:
    threads = max(1, min(torch.get_num_threads(), count // least))
    edges = [count * s // threads // 16 * 16 for s in range(threads)] + [count]
    stripes = [slice(edges[s], edges[s + 1]) for s in range(threads)]
    if threads == 1:
        return [work(stripes[0])]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, stripes))


def gather(gradient: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The gradient [n] at ``positions`` int32 [k] in float32, and whether all of that is finite.

    Raises:
        MisuseError: another data type than float32, bfloat16 and float16.
    """
    kind = _kind(gradient)
    if gradient.device.type != "cpu":
        return oracle.gather(gradient, positions)
    from thinwire.optim import kernels_cpu

    out = torch.empty(positions.numel(), dtype=torch.float32)
    cells, at, values = _cells(gradient), positions.numpy(), out.numpy()
    done = _in_stripes(at.size, _STRIPE_MIN, lambda s: kernels_cpu.gather(cells, kind, at[s], values[s]))
    return out, all(done)


def adam(
    weights: torch.Tensor, positions: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor,
    entered: torch.Tensor, now: int, step: AdamStep, masters: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`thinwire.optim.oracle.adam`, fused.

    >>> weights, at = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1], dtype=torch.int32)
    >>> m, v, g, entered = torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1, dtype=torch.int32)
    >>> step = AdamStep(torch.tensor([0.0, 0.1]), torch.tensor([1.0, 1.0]), 0.0, 0.0, 0.0, 1.0)
    >>> adam(weights, at, g, m, v, entered, 1, step)
    >>> weights
    tensor([1.0000, 1.9000, 3.0000])
    """
    kind = _kind(weights)
    if weights.device.type != "cpu":
        on_device = oracle.adam
        if weights.device.type == "cuda" and find_spec("triton") is not None:
            from thinwire.optim import kernels_triton

            on_device = kernels_triton.adam
        on_device(weights, positions, gradient, m, v, entered, now, step, masters)
        return
    from thinwire.optim import kernels_cpu

    numbers = np.array([1 - step.beta1, step.beta2, 1 - step.beta2, step.eps, step.decay], np.float32)
    held = np.empty(0, np.float32) if masters is None else masters.numpy()
    cells, arrays = _cells(weights), [x.numpy() for x in (positions, gradient, m, v, entered)]
    rates, corrections = step.rates.numpy(), step.corrections.numpy()
    _in_stripes(
        positions.numel(), _STRIPE_MIN,
        lambda s: kernels_cpu.adam(
            cells, kind, *(x[s] for x in arrays), now, rates, corrections, numbers,
            held if masters is None else held[s], step.maximize,
        ),
    )  # fmt: skip


def adam_everywhere(
    weights: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, age: int, lr: float, step: AdamStep
) -> None:  # fmt: skip
    """A step of all cells [n], float32, by the operations that torch's for-loop AdamW is made of, to the same bits."""
    g = -gradient if step.maximize else gradient
    weights.mul_(step.decay)
    m.lerp_(g, 1 - step.beta1)
    v.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
    below = (v.sqrt() / (1 - step.beta2**age) ** 0.5).add_(step.eps)
    weights.addcdiv_(m, below, value=-lr / (1 - step.beta1**age))


def sgd(
    weights: torch.Tensor, positions: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor,
    entered: torch.Tensor, now: int, step: SGDStep, masters: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`thinwire.optim.oracle.sgd`, fused."""
    kind = _kind(weights)
    if weights.device.type != "cpu":
        oracle.sgd(weights, positions, gradient, m, v, entered, now, step, masters)
        return
    from thinwire.optim import kernels_cpu

    numbers = np.array(
        [-step.lr, step.momentum, 1 - step.dampening, step.weight_decay, step.beta2, 1 - step.beta2], np.float32
    )
    held = np.empty(0, np.float32) if masters is None else masters.numpy()
    cells, arrays = _cells(weights), [x.numpy() for x in (positions, gradient, m, v, entered)]
    _in_stripes(
        positions.numel(), _STRIPE_MIN,
        lambda s: kernels_cpu.sgd(
            cells, kind, *(x[s] for x in arrays), now, numbers, step.nesterov,
            held if masters is None else held[s], step.maximize,
        ),
    )  # fmt: skip


def histogram(x: torch.Tensor) -> npt.NDArray[np.int64]:
    """How many magnitudes of ``x`` [n] have which leading 16 bits (without the sign) of float32: int64 [32768].

    >>> counts = histogram(torch.tensor([1.0, -1.0, 2.0]))
    >>> counts.nonzero()[0].tolist(), counts[counts > 0].tolist()
    ([16256, 16384], [2, 1])
    """
    if x.device.type != "cpu" or x.dtype == torch.float16:
        keys = (x.float().view(torch.int32) & 0x7FFF_FFFF) >> 16
        found: npt.NDArray[np.int64] = torch.bincount(keys, minlength=1 << 15).cpu().numpy()
        return found
    from thinwire.optim import kernels_cpu

    shift, mask = (16, 0x7FFF_FFFF) if x.dtype == torch.float32 else (0, 0x7FFF)
    cells = _cells(x)

    def count(s: slice) -> npt.NDArray[np.int64]:
        counts = np.zeros((4, 1 << 15), np.int64)
        kernels_cpu.tally(cells[s], np.uint32(shift), np.uint32(mask), counts)
        total: npt.NDArray[np.int64] = counts.sum(0)
        return total

    summed: npt.NDArray[np.int64] = np.sum(_in_stripes(cells.size, _STRIPE_DENSE, count), 0)
    return summed


def importance(
    v: torch.Tensor, entered: torch.Tensor, now: int, corrections: torch.Tensor, factor: float
) -> torch.Tensor:  # fmt: skip
    """``factor`` times ``sqrt(v)`` [k], each over ``corrections`` at its cell's age; float32 [k].

    >>> importance(torch.tensor([4.0]), torch.tensor([3], dtype=torch.int32), 3, torch.tensor([1.0, 0.5]), 2.0)
    tensor([8.])
    """
    if v.device.type != "cpu":
        return oracle.importance(v, entered, now, corrections, factor)
    from thinwire.optim import kernels_cpu

    out = torch.empty_like(v)
    arrays, ends = [x.numpy() for x in (v, entered)], out.numpy()
    table, by = corrections.numpy(), np.float32(factor)
    _in_stripes(
        v.numel(), _STRIPE_MIN, lambda s: kernels_cpu.importance(*(x[s] for x in arrays), now, table, by, ends[s])
    )
    return out


def absent(of: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Those of ``positions`` that are not in ``of``, in order; both int32 and strictly increasing.

    >>> absent(torch.tensor([1, 5], dtype=torch.int32), torch.tensor([0, 5, 7], dtype=torch.int32)).tolist()
    [0, 7]
    """
    if of.device.type != "cpu":
        return oracle.absent(of, positions)
    from thinwire.optim import kernels_cpu

    out = torch.empty_like(positions)
    return out[: int(kernels_cpu.absent(of.numpy(), positions.numpy(), out.numpy()))]


def merged(
    positions: torch.Tensor, stay: torch.Tensor, new: torch.Tensor, values: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """Positions that stay and new ones in order, and each of ``values`` (old ones [active], new ones [new]) with them.

    >>> old, mask, new = torch.tensor([1, 5, 7]), torch.tensor([True, False, True]), torch.tensor([0, 6])
    >>> merged(old, mask, new, [(torch.tensor([1.0, 5.0, 7.0]), torch.zeros(2))])
    (tensor([0, 1, 6, 7]), tensor([0., 1., 0., 7.]))
    """
    if positions.device.type != "cpu":
        return oracle.merged(positions, stay, new, values)
    from thinwire.optim import kernels_cpu

    out = torch.empty(int(stay.sum()) + new.numel(), dtype=positions.dtype)
    source = torch.empty(out.numel(), dtype=torch.int32)
    kernels_cpu.weave(positions.numpy(), stay.numpy(), new.numpy(), out.numpy(), source.numpy())
    joined = [out]
    for old, added in values:
        joined.append(torch.empty(out.numel(), dtype=old.dtype))
        kernels_cpu.pick(old.numpy(), added.numpy(), source.numpy(), joined[-1].numpy())
    return tuple(joined)

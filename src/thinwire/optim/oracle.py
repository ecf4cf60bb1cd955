"""The readable definition of a sparse step, in torch's own operations on any device; every fast version must equal it.

A step takes gradients at the active positions, moves the moments there, and writes the weights back. What torch's
for-loop optimisers compute for a whole tensor is computed here for a few of its cells, rounding by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["AdamStep", "SGDStep", "absent", "adam", "gather", "importance", "merged", "sgd"]


@dataclass(frozen=True, slots=True)
class AdamStep:
    """The numbers of one step of AdamW (Loshchilov and Hutter, arXiv:1711.05101), each rounded to float32 when used.

    Attributes:
        rates: float32 [ages], ``lr / (1 - beta1^t)`` for a cell in its t-th step, from t = 0 (not used) on.
        corrections: float32 [ages], ``sqrt(1 - beta2^t)``.
        beta1, beta2, eps: as in AdamW.
        decay: what weights are multiplied by before, ``1 - lr * weight_decay``.
        maximize: take the gradient's negative.
    """

    rates: torch.Tensor
    corrections: torch.Tensor
    beta1: float
    beta2: float
    eps: float
    decay: float
    maximize: bool = False


@dataclass(frozen=True, slots=True)
class SGDStep:
    """The numbers of one step of SGD as torch defines it; ``beta2`` is that of the importance beside it."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    beta2: float
    maximize: bool = False


def _fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``a * b + c`` rounded once, as torch's lerp, addcmul and add with alpha do: in float64 the product is exact."""
    return (a.double() * b.double() + c.double()).float()


def _add(x: torch.Tensor, other: torch.Tensor, factor: float) -> torch.Tensor:
    return _fused(torch.tensor(factor, dtype=torch.float32, device=x.device), other, x)


def _times(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * torch.tensor(factor, dtype=torch.float32, device=x.device)


def gather(gradient: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The gradient [n] at ``positions`` [k] in float32, and whether all of that is finite.

    >>> gather(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2], dtype=torch.int32))
    (tensor([1., 3.]), True)
    """
    found = gradient[positions.long()].float()
    return found, bool(found.isfinite().all())


def _second(v: torch.Tensor, g: torch.Tensor, beta2: float) -> torch.Tensor:
    return _fused(_times(g, 1 - beta2), g, _times(v, beta2))


def adam(
    weights: torch.Tensor, positions: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor,
    entered: torch.Tensor, now: int, step: AdamStep, masters: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """One AdamW step of ``weights`` [n] at ``positions`` [k], in place.

    Args:
        weights: float32, bfloat16 or float16 [n]; computed in float32 and rounded once.
        positions: int32 [k], strictly increasing.
        gradient, m, v: float32 [k].
        entered: int32 [k], the step in which each cell came in; its age is ``now - entered + 1``.
        masters: float32 [k], weights that are not rounded; ``weights`` become their rounding.
    """
    at = positions.long()
    g = -gradient if step.maximize else gradient
    age = (now - entered.long() + 1).clamp(max=step.rates.numel() - 1)
    w = (weights[at].float() if masters is None else masters) * torch.tensor(step.decay, dtype=torch.float32)
    m.copy_(_add(m, g - m, 1 - step.beta1))
    v.copy_(_second(v, g, step.beta2))
    # torch's own sqrt of float32 may be off by an ULP, in float64 and rounded it is exact
    below = v.double().sqrt().float() / step.corrections[age] + torch.tensor(step.eps, dtype=torch.float32)
    new = w + (-step.rates[age] * m) / below
    weights[at] = new.to(weights.dtype)
    if masters is not None:
        masters.copy_(new)


def sgd(
    weights: torch.Tensor, positions: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor,
    entered: torch.Tensor, now: int, step: SGDStep, masters: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """One SGD step at ``positions``, in place; ``v`` follows the gradient's square, for its importance only."""
    at = positions.long()
    g = -gradient if step.maximize else gradient
    v.copy_(_second(v, g, step.beta2))
    w = weights[at].float() if masters is None else masters
    if step.weight_decay:
        g = _add(g, w, step.weight_decay)
    if step.momentum:
        older = _add(_times(m, step.momentum), g, 1 - step.dampening)
        m.copy_(torch.where(entered == now, g, older))
        g = _add(g, m, step.momentum) if step.nesterov else m
    new = _add(w, g, -step.lr)
    weights[at] = new.to(weights.dtype)
    if masters is not None:
        masters.copy_(new)


def importance(
    v: torch.Tensor, entered: torch.Tensor, now: int, corrections: torch.Tensor, factor: float
) -> torch.Tensor:  # fmt: skip
    """``factor`` times ``sqrt(v)``, each over ``corrections`` at its cell's age."""
    age = (now - entered.long() + 1).clamp(max=corrections.numel() - 1)
    return _times(v.double().sqrt().float() / corrections[age], factor)


def absent(of: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Those of ``positions`` that are not in ``of``; both increase strictly."""
    if of.numel() == 0:
        return positions
    at = torch.searchsorted(of, positions).clamp(max=of.numel() - 1)
    return positions[of[at] != positions]


def merged(
    positions: torch.Tensor, stay: torch.Tensor, new: torch.Tensor, values: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """Positions that stay and new ones in order, and each of ``values`` (old [active], new [new]) with them."""
    kept = positions[stay]
    at_new = torch.arange(new.numel(), device=new.device) + torch.searchsorted(kept, new)
    fresh = torch.zeros(kept.numel() + new.numel(), dtype=torch.bool, device=new.device)
    fresh[at_new] = True

    def join(old: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        out = torch.empty(fresh.numel(), dtype=old.dtype, device=old.device)
        out[fresh] = added
        out[~fresh] = old
        return out

    return (join(kept, new), *(join(old[stay], added) for old, added in values))

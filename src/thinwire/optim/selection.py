"""Which cells become active: the largest importance over many tensors, exactly, without joining the tensors.

An active cell's importance is its own (an average over steps), kept in as few numbers as there are active cells. That
of any other is the magnitude of its gradient now. So one pass over the gradients finds the few that could enter, and
the rest happens among candidates. Zero is no importance: such cells never enter, and fewer than ``k`` may be active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np
import torch

from thinwire.optim.kernels import histogram
from thinwire.tensors.select import at_least, top_k

__all__ = ["Active", "choose", "merged"]

_TINY = 1.401298464324817e-45  # the smallest magnitude that is not zero
_INFINITE = 0x7F80  # the leading bits of infinity; those of NaN are as large or larger


@dataclass(frozen=True, slots=True)
class Active:
    """Positions int32 [k], strictly increasing, and their importance float32 [k]."""

    positions: torch.Tensor
    importance: torch.Tensor


def _member(of: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Which ``positions`` are among those of ``of``; both increase strictly."""
    if of.numel() == 0:
        return torch.zeros_like(positions, dtype=torch.bool)
    at = torch.searchsorted(of, positions).clamp(max=of.numel() - 1)
    return of[at] == positions


def _bound(gradients: Sequence[torch.Tensor], wanted: int) -> float:
    """A magnitude that at least ``wanted`` cells of all gradients reach, or the smallest there is; NaN where any cell
    is infinite or NaN."""
    counts = np.sum([histogram(g) for g in gradients], 0)
    if counts[_INFINITE:].any():
        return float("nan")
    from_top = counts[::-1].cumsum()
    steps = int(np.searchsorted(from_top, wanted))
    found = float(np.uint32(max(0, (1 << 15) - 1 - steps) << 16).view(np.float32))
    return max(found, _TINY)


def choose(
    gradients: Sequence[torch.Tensor], active: Sequence[Active], k: int
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """For each tensor, a mask [active] of the cells that stay and sorted positions int32 [new] of those that enter.

    Together they are the ``k`` cells of largest importance in all tensors; ties go to cells that are active, then to
    the first tensor's lowest position. None, if any gradient is infinite or NaN.

    Gradients are flat, of float32, bfloat16 or float16.

    >>> grads = [torch.tensor([0.0, 3.0, 1.0]), torch.tensor([2.0, 0.0])]
    >>> none = Active(torch.empty(0, dtype=torch.int32), torch.empty(0))
    >>> [(stay.tolist(), new.tolist()) for stay, new in choose(grads, [none, none], 2)]
    [([], [1]), ([], [0])]
    """
    held = sum(a.positions.numel() for a in active)
    bound = _bound(gradients, k + held)
    if isnan(bound):
        return None
    scores: list[torch.Tensor] = [a.importance for a in active]
    entrants = []
    for gradient, now in zip(gradients, active, strict=True):
        cap = min(gradient.numel(), k + now.positions.numel())
        found = at_least(gradient, bound, cap=cap)
        found = found[~_member(now.positions, found)]
        entrants.append(found)
        scores.append(gradient[found.long()].float().abs())
    joined = torch.cat(scores) if scores else torch.empty(0)
    taken = torch.zeros(joined.numel(), dtype=torch.bool, device=joined.device)
    taken[top_k(joined, min(k, joined.numel())).indices.long()] = True
    parts = torch.split(taken, [s.numel() for s in scores])
    count = len(entrants)
    return [(parts[t], entrants[t][parts[count + t]]) for t in range(count)]


def merged(
    positions: torch.Tensor, stay: torch.Tensor, new: torch.Tensor, values: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """Positions that stay and new ones in order, and each of ``values`` (old ones [active], new ones [new]) with them.

    >>> old, mask, new = torch.tensor([1, 5, 7]), torch.tensor([True, False, True]), torch.tensor([0, 6])
    >>> merged(old, mask, new, [(torch.tensor([1.0, 5.0, 7.0]), torch.zeros(2))])
    (tensor([0, 1, 6, 7]), tensor([0., 1., 0., 7.]))
    """
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

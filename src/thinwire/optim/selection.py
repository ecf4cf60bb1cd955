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

from thinwire.optim.kernels import absent, gather, histogram
from thinwire.tensors.select import at_least, top_k

__all__ = ["Active", "Choice", "choose", "draw"]

_TINY = 1.401298464324817e-45  # the smallest magnitude that is not zero
_BELOW = 0.9  # thresholds fall slowly: of normal gradients, at 1 %, twice as many cells lie above
_HYPERGEOMETRIC_MAX = 10**9
_INFINITE = 0x7F80  # the leading bits of infinity; those of NaN are as large or larger


@dataclass(frozen=True, slots=True)
class Active:
    """Positions int32 [k], strictly increasing, and their importance float32 [k]."""

    positions: torch.Tensor
    importance: torch.Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """For each tensor, a mask [active] of the cells that stay and sorted positions int32 [new] of those that enter; the
    smallest importance that was taken; whether as many as asked for were."""

    parts: list[tuple[torch.Tensor, torch.Tensor]]
    threshold: float
    complete: bool


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
    gradients: Sequence[torch.Tensor], active: Sequence[Active], k: int, hint: float = 0.0
) -> Choice | None:  # fmt: skip
    """The ``k`` cells of largest importance in all tensors; ties go to cells that are active, then to the first
    tensor's lowest position. None, if any gradient is infinite or NaN.

    Gradients are flat, of float32, bfloat16 or float16. ``hint`` is about the threshold to expect, such as that of the
    last choice; only the time depends on it.

    >>> grads = [torch.tensor([0.0, 3.0, 1.0]), torch.tensor([2.0, 0.0])]
    >>> none = Active(torch.empty(0, dtype=torch.int32), torch.empty(0))
    >>> found = choose(grads, [none, none], 2)
    >>> [(stay.tolist(), new.tolist()) for stay, new in found.parts], found.threshold
    ([([], [1]), ([], [0])], 2.0)
    """
    guess = hint * _BELOW
    if _TINY < guess < float("inf"):
        found = _among(gradients, active, k, guess, hint)
        if found is None or (found.complete and found.threshold >= guess):
            return found  # every cell that is not among the candidates lies below the guess
    bound = _bound(gradients, k + sum(a.positions.numel() for a in active))
    return None if isnan(bound) else _among(gradients, active, k, bound, None)


def _among(
    gradients: Sequence[torch.Tensor], active: Sequence[Active], k: int, bound: float, hint: float | None
) -> Choice | None:
    """The choice among what is active and the cells whose gradients reach ``bound``."""
    scores: list[torch.Tensor] = [a.importance for a in active]
    entrants = []
    for gradient, now in zip(gradients, active, strict=True):
        found = at_least(gradient, bound, cap=min(gradient.numel(), k + now.positions.numel()))
        new = absent(now.positions, found)
        values, finite = gather(gradient, new)
        if not finite or (hint is not None and not gather(gradient, found)[1]):
            return None
        entrants.append(new)
        scores.append(values.abs_())
    joined = torch.cat(scores) if scores else torch.empty(0)
    taken = torch.zeros(joined.numel(), dtype=torch.bool, device=joined.device)
    best = top_k(joined, min(k, joined.numel()), hint=hint)
    taken[best.indices.long()] = True
    parts = torch.split(taken, [s.numel() for s in scores])
    count = len(entrants)
    pairs = [(parts[t], entrants[t][parts[count + t]]) for t in range(count)]
    return Choice(pairs, best.threshold, joined.numel() >= k)


def draw(
    sizes: Sequence[int], active: Sequence[torch.Tensor], k: int, random: np.random.Generator
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``k`` cells of all tensors together at random, each set of so many as likely as any other, by the fewest changes:
    all that are active stay if there are not more than ``k``, else none enters. As ``Choice.parts``.

    Takes time and memory for the cells that are drawn, not for all there are. ``active`` are positions int32,
    strictly increasing.

    >>> (stay, new), = draw([10], [torch.tensor([2, 3], dtype=torch.int32)], 4, np.random.default_rng(0))
    >>> stay.tolist(), len(new), {2, 3} & set(new.tolist())
    ([True, True], 2, set())
    """
    held = [len(positions) for positions in active]
    if k <= sum(held):
        kept = _counts(held, k, random)
        return [_kept(positions, n, random) for positions, n in zip(active, kept, strict=True)]
    free = [size - n for size, n in zip(sizes, held, strict=True)]
    entering = _counts(free, min(k, sum(sizes)) - sum(held), random)
    return [
        (torch.ones_like(positions, dtype=torch.bool), _entrants(positions, room, n, random))
        for positions, room, n in zip(active, free, entering, strict=True)
    ]


def _counts(sizes: Sequence[int], k: int, random: np.random.Generator) -> list[int]:
    """How many of ``k`` cells that are drawn from all sets together fall into each: hypergeometric, set by set."""
    rest, found = sum(sizes), []
    for size in sizes:
        rest -= size
        if max(size, rest) < _HYPERGEOMETRIC_MAX:
            n = int(random.hypergeometric(size, rest, k)) if k and size else 0
        else:  # numpy does not draw beyond; with so many cells it is binomial to the last digit
            n = min(max(int(random.binomial(k, size / (size + rest))), k - rest), size, k)
        found.append(n)
        k -= n
    return found


def _kept(positions: torch.Tensor, n: int, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    stay = torch.zeros_like(positions, dtype=torch.bool)
    stay[torch.from_numpy(random.choice(len(positions), n, replace=False)).to(stay.device)] = True
    return stay, positions[:0]


def _entrants(positions: torch.Tensor, room: int, n: int, random: np.random.Generator) -> torch.Tensor:
    """``n`` of the ``room`` cells that are not at ``positions``."""
    ranks = np.sort(random.choice(room, n, replace=False))  # among those that are not active
    held = positions.cpu().numpy().astype(np.int64)
    below = np.searchsorted(held - np.arange(len(held)), ranks, side="right")  # active cells before each of them
    return torch.from_numpy((ranks + below).astype(np.int32)).to(positions.device)

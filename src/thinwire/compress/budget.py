"""Densities over layers: which parameter gets how many of the elements that are to be sent.

One top-k over a whole update lets the layers of large gradients take everything. Here a total is shared out in
proportion to a score of each parameter, and exactly: the arithmetic is rational, so that all ranks and all machines
that see the same scores come to the same counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor, isfinite
from typing import final

import torch
from torch import Tensor

from thinwire.compress.base import Layout, check_density
from thinwire.errors import MisuseError

__all__ = ["allocate", "gradient_norm_share", "sensitivity"]


@final
@dataclass(frozen=True)
class _Claim:
    """What one parameter may get."""

    index: int
    score: Fraction
    numel: int
    low: int
    high: int


def allocate(
    total: int,
    scores: Sequence[float],
    numels: Sequence[int],
    *,
    minimum: int = 1,
    maximum_density: float = 1.0,
    whole_below: int = 0,
) -> tuple[int, ...]:
    """How many of ``total`` elements each parameter sends: in proportion to its score, within bounds.

    A parameter gets at least ``minimum`` elements and at most ``maximum_density`` of its own; one of fewer than
    ``whole_below`` elements (norms and biases matter more than they weigh) is sent whole. Shares that the bounds cut
    off go to the others, again by score; parameters of score zero get more than their minimum only once all others
    are full, and then by size. Fractions are settled by largest remainder (Hamilton's method), ties by score, size,
    then position.

    Laws: the counts sum to ``min(total, what the maxima add up to)``; raising a score never lowers its count; of two
    parameters of one size the one with the higher score gets no less; the order of the parameters does not matter.
    Where ``total`` does not even cover the minima, these are the maxima: the total counts for more.

    Raises:
        MisuseError: A score is negative, NaN or infinite, or a bound makes no sense.

    >>> allocate(100, scores=[8.0, 1.0, 1.0], numels=[60, 500, 500])
    (60, 20, 20)
    >>> allocate(100, scores=[8.0, 1.0, 1.0], numels=[1000, 500, 10], whole_below=64)
    (80, 10, 10)
    """
    if len(scores) != len(numels):
        raise MisuseError(f"{len(scores)} scores for {len(numels)} parameters; give one each")
    if any(not (isfinite(score) and score >= 0) for score in scores):
        raise MisuseError("scores must be finite and not negative; leave out steps whose gradients overflow")
    if total < 0 or minimum < 0 or any(numel < 0 for numel in numels):
        raise MisuseError(f"total={total}, minimum={minimum} and the numbers of elements must not be negative")
    check_density(maximum_density)
    claims = []
    for index, (score, numel) in enumerate(zip(scores, numels, strict=True)):
        low = numel if numel < whole_below else min(minimum, numel)
        high = numel if numel < whole_below else max(low, floor(maximum_density * numel))
        claims.append(_Claim(index, Fraction(score), numel, low, high))
    if total < sum(claim.low for claim in claims):
        claims = [_Claim(claim.index, claim.score, claim.numel, 0, claim.low) for claim in claims]
    counts = dict.fromkeys(range(len(claims)), 0)
    scored = [claim for claim in claims if claim.score]
    others = [_Claim(c.index, Fraction(max(1, c.numel)), c.numel, c.low, c.high) for c in claims if not c.score]
    # Those without a score get what those with one cannot take.
    for_scored = total - sum(claim.low for claim in others)
    taken = _share_out(for_scored, scored)
    counts.update(taken)
    counts.update(_share_out(total - sum(taken.values()), others))
    return tuple(counts.values())


def _share_out(total: int, claims: list[_Claim]) -> dict[int, int]:
    """Counts by index. ``total`` is no less than the claims' minima; scores are positive."""
    total = min(total, sum(claim.high for claim in claims))
    shares = _water_level(total, claims)
    counts = {claim.index: floor(share) for claim, share in zip(claims, shares, strict=True)}
    missing = total - sum(counts.values())
    order = sorted(
        zip(claims, shares, strict=True),
        key=lambda pair: (floor(pair[1]) - pair[1], -pair[0].score, -pair[0].numel, pair[0].index),
    )
    for claim, _ in order[:missing]:
        counts[claim.index] += 1
    return counts


def _water_level(total: int, claims: list[_Claim]) -> list[Fraction]:
    """Shares ``min(high, max(low, level * score))`` for the level at which they add up to ``total``.

    Their sum grows with the level, in straight pieces: from each level at which a share leaves its minimum or reaches
    its maximum, to the next.
    """
    bends = sorted(
        [(Fraction(claim.low) / claim.score, claim.score) for claim in claims]
        + [(Fraction(claim.high) / claim.score, -claim.score) for claim in claims]
    )
    level, reached, slope = Fraction(0), Fraction(sum(claim.low for claim in claims)), Fraction(0)
    for bend, change in bends:
        step = slope * (bend - level)
        if reached + step >= total:
            break
        reached, level, slope = reached + step, bend, slope + change
    if slope:
        level += (total - reached) / slope
    return [min(Fraction(claim.high), max(Fraction(claim.low), level * claim.score)) for claim in claims]


def gradient_norm_share(update: Tensor, layout: Layout) -> tuple[float, ...]:
    """Each parameter's share of the squared norm of ``update`` (float32 ``[numel]``), summing to 1.

    An update of zeros is shared by size, one that is not finite gives scores that :func:`allocate` refuses.

    >>> gradient_norm_share(torch.tensor([3.0, 0.0, 4.0]), Layout(((2,), (1,))))
    (0.36, 0.64)
    """
    return _shares([part.double().square().sum() for part in _cut(update, layout)], layout)


def sensitivity(weights: Tensor, update: Tensor, layout: Layout) -> tuple[float, ...]:
    """Each parameter's share of ``sum |weight * gradient|``: to first order, how much the loss would change if its
    weights were removed one at a time (Molchanov et al. 2017; SNIP, Lee et al. 2019, eq. 4). Sums to 1.

    >>> sensitivity(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, -1.0, 2.0]), Layout(((2,), (1,))))
    (0.75, 0.25)
    """
    pairs = zip(_cut(weights, layout), _cut(update, layout), strict=True)
    return _shares([(weight.double() * part.double()).abs().sum() for weight, part in pairs], layout)


def _cut(update: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    if update.dim() != 1 or update.numel() != layout.numel:
        raise MisuseError(f"an update of shape {tuple(update.shape)} for a layout of {layout.numel} elements")
    return torch.split_with_sizes(update, list(layout.numels)) if layout.numels else ()


def _shares(scores: list[Tensor], layout: Layout) -> tuple[float, ...]:
    if not scores:
        return ()
    stacked = torch.stack(scores)
    if not bool(stacked.any()):
        stacked = torch.tensor(layout.numels, dtype=torch.float64)
    return tuple((stacked / stacked.sum().clamp_(min=torch.finfo(torch.float64).tiny)).tolist())

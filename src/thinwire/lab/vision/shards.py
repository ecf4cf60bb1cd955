"""Which worker learns from which samples, and in which order.

Shards are disjoint and of equal size, so that all workers make the same number of steps; up to ``workers - 1`` samples
are left out. Everything depends on the seed alone: the place in an epoch is all that a checkpoint needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.errors import MisuseError

__all__ = ["epoch_order", "make_shards"]


def make_shards(labels: Tensor, workers: int, *, skew: float, seed: int) -> list[Tensor]:
    """The samples of each worker, int64 ``[N // workers]`` each.

    With a ``skew`` of s, a worker's own classes make up a share s of its samples, and the rest is drawn from what is
    left of all classes: "1 - s similar" data (Karimireddy et al. 2020, arXiv:1910.06378, section 7). Its own are those
    that it gets when samples sorted by class are cut into one part for each worker, so two neighbours may share one.

    Raises:
        MisuseError: there are fewer samples than workers.

    >>> labels = torch.tensor([0, 1] * 4)
    >>> [sorted(labels[shard].tolist()) for shard in make_shards(labels, 2, skew=1.0, seed=0)]
    [[0, 0, 0, 0], [1, 1, 1, 1]]
    """
    size = len(labels) // workers
    if size == 0:
        raise MisuseError(f"{len(labels)} samples are too few for {workers} workers; start fewer", workers=workers)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)[: size * workers]
    by_class = order[torch.sort(labels[order], stable=True).indices]  # within a class, still at random
    own = round(skew * size)
    kept, pool = [], []
    for worker in range(workers):
        part = by_class[worker * size : (worker + 1) * size]
        mixed = part[torch.randperm(size, generator=generator)]
        kept.append(mixed[:own])
        pool.append(mixed[own:])
    rest = torch.cat(pool)
    rest = rest[torch.randperm(len(rest), generator=generator)]
    return [torch.cat(both) for both in zip(kept, rest.chunk(workers) if len(rest) else pool, strict=True)]


def epoch_order(shard: Tensor, *, epoch: int, rank: int, seed: int) -> Tensor:
    """``shard`` as worker ``rank`` goes through it in ``epoch``, another way in each."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, rank, epoch))
    return shard[torch.randperm(len(shard), generator=generator)]


def mixed_seed(*numbers: int) -> int:
    """One seed of several numbers, all of them well mixed (SplitMix64's finaliser; Steele et al. 2014).

    >>> mixed_seed(1, 2) == mixed_seed(1, 2), mixed_seed(1, 2) == mixed_seed(2, 1)
    (True, False)
    """
    state, mask = 0, (1 << 64) - 1
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1

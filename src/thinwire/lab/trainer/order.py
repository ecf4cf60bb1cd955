"""In which order a worker goes through its samples: a function of the seed, its rank and the epoch alone.

So the place in an epoch is all that a checkpoint needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["epoch_order", "mixed_seed"]


def epoch_order(shard: Tensor, *, epoch: int, rank: int, seed: int) -> Tensor:
    """``shard`` as worker ``rank`` goes through it in ``epoch``, another way in each.

    >>> epoch_order(torch.arange(4), epoch=0, rank=0, seed=1).sort().values
    tensor([0, 1, 2, 3])
    """
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

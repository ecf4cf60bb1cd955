"""Which worker learns from which samples, and in which order.

Shards are disjoint and of equal size, so that all workers make the same number of steps; up to ``workers - 1`` samples
are left out. Everything depends on the seed alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.lab.trainer.order import epoch_order, mixed_seed

__all__ = ["epoch_order", "make_shards", "mixed_seed"]


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

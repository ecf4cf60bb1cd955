"""Which worker learns from which windows of a text."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.errors import MisuseError

__all__ = ["corrupted_ranks", "make_text_shards"]


def make_text_shards(count: int, workers: int, *, kind: str, seed: int) -> list[Tensor]:
    """Which of ``count`` windows each worker has, int64 ``[count // workers]`` each, disjoint; up to ``workers - 1``
    are left out.

    ``iid``: drawn alike. ``non_iid``: each has a part of the text of its own. ``clean_vs_corrupt``: those of ``iid``,
    so that a run differs from it by the corruption alone (:func:`corrupted_ranks`).

    Raises:
        MisuseError: there are fewer windows than workers, or no such kind.

    >>> make_text_shards(6, 2, kind="non_iid", seed=0)
    [tensor([0, 1, 2]), tensor([3, 4, 5])]
    """
    size = count // workers
    if size == 0:
        raise MisuseError(
            f"{count} windows of text are too few for {workers} workers; start fewer, or make --context smaller",
            workers=workers,
        )
    if kind == "non_iid":
        order = torch.arange(size * workers)
    elif kind in ("iid", "clean_vs_corrupt"):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: size * workers]
    else:
        raise MisuseError(f"there are no shards {kind!r}; give iid, non_iid or clean_vs_corrupt", shards=kind)
    return list(torch.split(order, size))


def corrupted_ranks(workers: int, *, kind: str, corrupt_workers: int) -> range:
    """The workers whose data or gradients are spoilt: the last ``corrupt_workers`` with ``clean_vs_corrupt``.

    Raises:
        MisuseError: there are not so many workers.

    >>> corrupted_ranks(8, kind="clean_vs_corrupt", corrupt_workers=2)
    range(6, 8)
    >>> corrupted_ranks(8, kind="iid", corrupt_workers=2)
    range(0, 0)
    """
    if kind != "clean_vs_corrupt":
        return range(0)
    if corrupt_workers > workers:
        raise MisuseError(
            f"{corrupt_workers} of {workers} workers cannot be corrupted; start more, or lower --corrupt-workers",
            workers=workers,
        )
    return range(workers - corrupt_workers, workers)

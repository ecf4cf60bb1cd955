"""How low a sample's bound must lie so that enough of the whole almost surely reaches it."""

from __future__ import annotations

from math import ceil, sqrt

__all__ = ["INFINITY", "LARGEST", "rank_in_sample", "room_for"]

INFINITY = 0x7F80_0000
"""The key (bits of the magnitude) of infinity; that of NaN is larger."""
LARGEST = 0x7FFF_FFFF


def rank_in_sample(k: int, numel: int, size: int) -> int:
    """The rank among ``size`` sampled keys whose key at least ``k`` of all ``numel`` almost surely reach.

    The sample holds about ``m = k * size / numel`` of the ``k`` largest, with a deviation of at most ``sqrt(m)``; the
    rank lies four deviations and a few more below. 0 where ``k`` is so large that candidates would save nothing.

    >>> rank_in_sample(250_000, 25_000_000, 1 << 16), rank_in_sample(1, 25_000_000, 1 << 16)
    (766, 9)
    """
    m = k * size / numel
    rank = ceil(m + 4 * sqrt(m) + 8)
    return rank if rank <= size // 2 else 0


def room_for(rank: int, numel: int, size: int) -> int:
    """Candidates that almost surely are not exceeded, if the bound is the ``rank``-th of the sample.

    >>> room_for(766, 25_000_000, 1 << 16)
    358605
    """
    return ceil((rank + 6 * sqrt(rank) + 8) * numel / size)

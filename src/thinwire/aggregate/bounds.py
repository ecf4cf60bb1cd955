"""Weights within bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["fill"]

Array = NDArray[np.float64]


def fill(merit: Array, share: Array, low: Array, high: Array) -> Array:
    """Weights that sum to 1, lie within ``low`` and ``high`` and are proportional to ``merit`` where no bound holds
    them (water-filling). What those with merit cannot take goes to those without, in proportion to ``share``.

    All are float64 ``[P]``, ``sum(low) <= 1 <= sum(high)``, and ``low <= high``.

    >>> import numpy as np
    >>> three = np.ones(3)
    >>> fill(np.array([8.0, 1.0, 1.0]), three / 3, 0.0 * three, 0.5 * three).tolist()
    [0.5, 0.25, 0.25]
    """
    if not (merit > 0).any():
        merit = share if (share > 0).any() else np.ones_like(share)
    merit = merit / merit.max()  # equal ones are 1, and then exactly 1 / P
    weights = _proportional(merit, low, high)
    left = 1.0 - weights.sum()
    if left > 1e-12:
        idle = merit <= 0
        rest = np.where(idle, share, 0.0) if share[idle & (high > low)].any() else np.where(idle, 1.0, 0.0)
        held = np.where(idle, low, weights)
        weights = _proportional(rest, held, np.where(idle, high, weights))
    return weights


def _proportional(merit: Array, low: Array, high: Array) -> Array:
    """Fixes those beyond a bound, the side with more to correct first, until the rest fits; at most P rounds."""
    weights, free = low.copy(), merit > 0
    while free.any():
        weights[free] = merit[free] * ((1.0 - weights[~free].sum()) / merit[free].sum())
        above = np.where(free, np.maximum(0.0, weights - high), 0.0)
        below = np.where(free, np.maximum(0.0, low - weights), 0.0)
        if not above.any() and not below.any():
            break
        fixed = above > 0 if above.sum() >= below.sum() else below > 0
        weights[fixed] = np.where(above > 0, high, low)[fixed]
        free &= ~fixed
    return weights

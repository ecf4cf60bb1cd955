"""Weights within bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["fill"]

Array = NDArray[np.float64]


def fill(merit: Array, share: Array, low: Array, high: Array) -> Array:
    """Weights that sum to 1, lie within ``low`` and ``high`` and are proportional to ``merit`` where no bound holds
    them (water-filling). What those with merit cannot take goes to those without, in proportion to ``share``, and what
    is left even then to the rest.

    All are float64 ``[P]``, ``sum(low) <= 1 <= sum(high)``, and ``low <= high``.

    >>> import numpy as np
    >>> three = np.ones(3)
    >>> fill(np.array([8.0, 1.0, 1.0]), three / 3, 0.0 * three, 0.5 * three).tolist()
    [0.5, 0.25, 0.25]
    """
    weights, idle = low, np.ones(len(low), dtype=bool)
    for claim in (merit, share, np.ones(len(low))):
        part = np.where(idle, claim, 0.0)
        weights = _proportional(part, weights, np.where(part > 0, high, weights))
        idle &= part <= 0
        if weights.sum() >= 1 - 1e-12:
            break
    return weights


def _proportional(merit: Array, low: Array, high: Array) -> Array:
    """Fixes those beyond a bound, the side with more to correct first, until the rest fits; at most P rounds."""
    weights, free = low.copy(), merit > 0
    while free.any():
        part = merit[free] / merit[free].max()  # equal ones are 1, and then exactly 1 / P; tiny ones do not overflow
        weights[free] = part * ((1.0 - weights[~free].sum()) / part.sum())
        above = np.where(free, np.maximum(0.0, weights - high), 0.0)
        below = np.where(free, np.maximum(0.0, low - weights), 0.0)
        if not above.any() and not below.any():
            break
        fixed = above > 0 if above.sum() >= below.sum() else below > 0
        weights[fixed] = np.where(above > 0, high, low)[fixed]
        free &= ~fixed
    return weights

"""Learning rates as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from thinwire.lab.trainer.options import TrainingOptions

__all__ = ["learning_rate"]


def learning_rate(options: TrainingOptions, step: int, steps: int, warmup_steps: int) -> float:
    """The rate of step ``step`` (from 0) of ``steps``.

    It rises linearly over ``warmup_steps`` (Goyal et al. 2017, arXiv:1706.02677), and then falls to 0 along a half
    cosine (Loshchilov & Hutter 2017, arXiv:1608.03983), or by ``decay_factor`` each ``decay_every`` of the run.

    >>> options = TrainingOptions(lr=1.0, schedule="step", decay_every=0.5)
    >>> [learning_rate(options, step, 8, 2) for step in range(8)]
    [0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1]
    """
    peak = options.peak_lr
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if options.schedule == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if options.schedule == "step":
        return peak * options.decay_factor ** int(step / steps / options.decay_every)
    return peak

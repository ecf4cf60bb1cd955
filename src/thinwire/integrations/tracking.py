"""A tracker that follows an optimiser by itself: in plain PyTorch, and what the callbacks of trainers share.

>>> from thinwire.probe.tracker import SparsityTracker
>>> model = torch.nn.Linear(4, 4)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> seen = []
>>> handle = track(SparsityTracker(model), optimizer, seen.append)
>>> model(torch.ones(1, 4)).sum().backward()
>>> optimizer.step()
>>> seen[0].changed > 0
True
>>> handle.remove()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from thinwire.probe.statistics import StepStats
from thinwire.probe.tracker import SparsityTracker

__all__ = ["log_values", "plain_optimizer", "track"]


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside of wrappers such as Accelerate's and Lightning's."""
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate"):
        optimizer = optimizer.optimizer
    return optimizer


def track(
    tracker: SparsityTracker, optimizer: torch.optim.Optimizer, on_stats: Callable[[StepStats], None] | None = None
) -> RemovableHandle:
    """Measure after each of the optimiser's steps, until the handle that is returned is removed.

    ``on_stats`` gets what each step found. Where fp32 masters are copied to bf16 weights after the step, call
    ``tracker.step()`` by hand instead: this would come too early.
    """

    def measure(*_: Any) -> None:
        stats = tracker.step()
        if on_stats is not None:
            on_stats(stats)

    return optimizer.register_step_post_hook(measure)


def log_values(stats: StepStats, prefix: str = "sparsity/") -> dict[str, float]:
    """A step's numbers for loggers: the share that changed, by lag, the null and the excess, the update ratio, by kind.

    >>> sorted(log_values(StepStats(1, {})))
    []
    """
    found: dict[str, float] = {}
    for lag, one in stats.lags.items():
        found[f"{prefix}density_{lag}"] = one.density
        if one.null is not None and one.excess is not None:
            found |= {f"{prefix}null_{lag}": one.null, f"{prefix}excess_{lag}": one.excess.value}
    if stats.lags:
        found[f"{prefix}update_ratio"] = stats.update_ratio
        found |= {f"{prefix}density_{kind}": changes.density for kind, changes in stats.kinds.items()}
    return found

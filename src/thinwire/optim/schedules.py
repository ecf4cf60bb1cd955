"""Schedules of the density, used as torch's schedulers of the learning rate are; a new one holds from the next step.

>>> import torch
>>> from thinwire.optim.aspg import ASPG
>>> optimizer = ASPG([torch.nn.Parameter(torch.ones(10))], density=0.5)
>>> schedule = CosineDensity(optimizer, end=0.1, steps=2)
>>> for _ in range(3):
...     schedule.step()
...     print(round(optimizer.param_groups[0]["density"], 3))
0.3
0.1
0.1
"""

from __future__ import annotations

from math import cos, isfinite, pi
from typing import Any

from thinwire.errors import MisuseError
from thinwire.optim.aspg import ASPG

__all__ = ["CosineDensity", "PlateauDensity"]


class CosineDensity:
    """From the groups' densities to ``end`` in ``steps`` calls of :meth:`step`, along half a cosine."""

    def __init__(self, optimizer: ASPG, *, end: float, steps: int, update_every: int = 1) -> None:
        if not 0 < end <= 1 or steps < 1 or update_every < 1:
            raise MisuseError("end must be above 0 and at most 1, steps and update_every at least 1")
        self.optimizer, self.end, self.steps, self.update_every, self.done = optimizer, end, steps, update_every, 0
        self.starts = [group["density"] for group in optimizer.param_groups]

    def step(self) -> None:
        """Call it after each step. Every change makes the set be chosen anew: ``update_every`` makes them fewer."""
        self.done += 1
        if self.done % self.update_every and self.done < self.steps:
            return
        share = (1 + cos(pi * min(self.done, self.steps) / self.steps)) / 2
        for group, start in zip(self.optimizer.param_groups, self.starts, strict=False):
            group["density"] = self.end if self.done >= self.steps else self.end + (start - self.end) * share

    def state_dict(self) -> dict[str, Any]:
        """Where it is, and where it came from."""
        return {"done": self.done, "starts": list(self.starts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.done, self.starts = state_dict["done"], list(state_dict["starts"])


class PlateauDensity:
    """Multiplies the density by ``factor`` when a loss has not fallen for ``patience`` calls, or is not finite.

    Density stays at most ``most``. A group that is above it already is left as it is.
    """

    def __init__(self, optimizer: ASPG, *, factor: float = 2.0, patience: int = 10, most: float = 1.0) -> None:
        if not factor > 1 or patience < 1 or not 0 < most <= 1:
            raise MisuseError("factor must be above 1, patience at least 1, most above 0 and at most 1")
        self.optimizer, self.factor, self.patience, self.most = optimizer, factor, patience, most
        self.best, self.waited = float("inf"), 0

    def step(self, loss: float) -> None:
        """Call it with the loss, smoothed if it is noisy."""
        if loss < self.best:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited < self.patience and isfinite(loss):
            return
        self.waited = 0
        for group in self.optimizer.param_groups:
            group["density"] = max(group["density"], min(self.most, group["density"] * self.factor))

    def state_dict(self) -> dict[str, Any]:
        """The best loss, and how long it has been waited for."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.best, self.waited = state_dict["best"], state_dict["waited"]

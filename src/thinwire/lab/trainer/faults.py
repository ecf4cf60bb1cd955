"""What a worker can be made to do wrong with its gradient, for experiments on how the others bear it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Fault", "PastWeights"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One step's: the gradient is multiplied by ``sign``, and taken at the weights of ``delay`` steps ago."""

    sign: float = 1.0
    delay: int = 0


class PastWeights:
    """The weights with which the last ``steps`` steps began: so many copies of the model's parameters.

    Buffers (BatchNorm's statistics) are not among them.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> past = PastWeights(model, steps=1)
    >>> for number in range(3):
    ...     _ = model.weight.data.fill_(number)
    ...     with past.step(delay=1):
    ...         print(model.weight.item(), end=" ")
    0.0 0.0 1.0
    >>> model.weight.item()
    2.0
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._past: deque[list[Tensor]] = deque(maxlen=steps + 1)

    @contextmanager
    def step(self, delay: int) -> Iterator[None]:
        """The next step: within, the model has the weights of ``delay`` steps ago, or the oldest there are."""
        now = [weight.detach().clone() for weight in self._weights]
        self._past.append(now)
        if delay == 0:
            yield
            return
        self._write(self._past[max(0, len(self._past) - 1 - delay)])
        try:
            yield
        finally:
            self._write(now)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    def state(self) -> list[list[Tensor]]:
        """What a checkpoint needs."""
        return list(self._past)

    def load(self, state: list[list[Any]]) -> None:
        """Go on from :meth:`state`.

        Raises:
            ValueError: it is of another model.
        """
        shapes = [weight.shape for weight in self._weights]
        for values in state:
            if [value.shape for value in values] != shapes:
                raise ValueError("the past weights are those of another model")
        self._past.clear()
        self._past.extend([value.to(w.device) for value, w in zip(values, self._weights, strict=True)]
                          for values in state)  # fmt: skip

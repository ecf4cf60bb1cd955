"""Random gradients for nulls and controls: of a given distribution, size and correlation from step to step.

>>> source = gradient_source(Gradients(rms=0.5, correlation=0.9), (1000,), seed=0)
>>> first, second = next(source), next(source)
>>> 0.8 < float((first * second).mean() / (first * first).mean()) < 1.0
True
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from thinwire.errors import MisuseError

__all__ = ["Gradients", "gradient_source"]


@dataclass(frozen=True, slots=True)
class Gradients:
    """The law of random gradients, independent from element to element.

    ``distribution``: ``gaussian``, ``sign`` (all of one magnitude) or ``laplace`` (heavier tails). ``rms``: the root of
    their mean square. ``correlation`` from one step to the next, of a stationary first-order autoregressive process (of
    ``sign``: of the Gaussian process whose signs are taken).
    """

    distribution: Literal["gaussian", "sign", "laplace"] = "gaussian"
    rms: float = 1.0
    correlation: float = 0.0

    def __post_init__(self) -> None:
        if self.distribution not in ("gaussian", "sign", "laplace"):
            raise MisuseError(f"distribution={self.distribution!r}; known are gaussian, sign and laplace")
        if not 0 <= self.rms < float("inf"):
            raise MisuseError(f"rms={self.rms}; give a finite number of at least 0")
        if not -1 < self.correlation < 1:
            raise MisuseError(f"correlation={self.correlation}; give a number between -1 and 1")


def _innovation(gradients: Gradients, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    if gradients.distribution != "laplace":
        return normal
    spread = torch.empty(shape).exponential_(generator=generator)  # a Laplace number is a normal one of such variance
    return normal * spread.sqrt()


def gradient_source(gradients: Gradients, shape: tuple[int, ...], *, seed: int) -> Iterator[Tensor]:
    """Gradients of ``shape`` in float32, one a step, without end; a function of the arguments alone."""
    generator = torch.Generator().manual_seed(seed)
    keep = gradients.correlation
    current = _innovation(gradients, shape, generator)
    while True:
        yield (current.sign() if gradients.distribution == "sign" else current) * gradients.rms
        fresh = _innovation(gradients, shape, generator)
        current = keep * current + sqrt(1 - keep * keep) * fresh if keep else fresh

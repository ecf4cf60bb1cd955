"""A training loop in small, as the tests of the exchange drive it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinwire.compress import Compressor
from thinwire.compress.group import MemoryGroup
from thinwire.integrations.exchange import Exchange

SHAPES = {"a": (40, 10), "b": (37,), "c": (16, 30)}
SIZES = {key: int(torch.tensor(shape).prod()) for key, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())


def gradient(rank: int, step: int, n: int = TOTAL) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(n, generator=generator) ** 3


class Trainer:
    """One rank of a training loop that only adds up what it is given."""

    def __init__(self, group: MemoryGroup, compressor: Compressor | None, **options: Any) -> None:
        self.exchange = Exchange(compressor, group, **options)
        self.rank = group.rank
        self.applied = torch.zeros(TOTAL, dtype=torch.float64)

    def step(self, number: int, keys: tuple[str, ...] = tuple(SHAPES), weight: float = 1.0, **how: Any) -> Tensor:
        flat = gradient(self.rank, number)
        for change in how.get("changes", ()):
            change(self.rank, flat)
        scale = how.get("scale", 1.0)
        flat = (flat * scale).to(how.get("dtype", torch.float32))
        parts = dict(zip(SHAPES, torch.split(flat, list(SIZES.values())), strict=True))
        bucket = torch.cat([parts[key] for key in keys])
        self.exchange.reduce_(bucket, keys, [SHAPES[key] for key in keys])
        out = dict(zip(keys, torch.split(bucket, [SIZES[key] for key in keys]), strict=True))
        mean = torch.cat([out[key] for key in SHAPES])
        if mean.isfinite().all():
            self.applied += weight * mean.double() / scale
        return mean

    def residual(self) -> Tensor:
        parameters = self.exchange.state_dict()["parameters"]
        return torch.cat([parameters[key]["residual"] for key in SHAPES]).double()


def check_law(applied: Tensor, residuals: list[Tensor], true: Tensor, tolerance: float = 3e-6) -> None:
    have = applied + sum(residuals) / len(residuals)
    assert float((have - true).abs().max()) <= tolerance * float(true.abs().max())


def true_sum(size: int, steps: range | list[int]) -> Tensor:
    return sum((gradient(r, s).double() for r in range(size) for s in steps), start=torch.zeros(TOTAL).double()) / size

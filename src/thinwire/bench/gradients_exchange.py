"""What a method of the gradient benchmark is: a communication hook as DDP would call it, bucket by bucket."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.bench.gradients_workload import Bucket

__all__ = ["FLOAT", "Exchange", "Method", "count", "exchange_all", "numel_of", "ring", "selected"]

FLOAT = 4
"""Bytes of a float32."""


class Exchange(ABC):
    """One method at work on one rank. Making one, and every call, is collective."""

    one_by_one = False
    """Whether a bucket must be done before the next begins."""

    @abstractmethod
    def hook(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        """Begins to average a bucket; the future holds the result."""

    def residual(self) -> Tensor | None:
        """What error feedback keeps back for later steps, float32 like all buckets in a row; None without it."""
        return None

    def received_bytes(self) -> int | None:
        """Payload received so far by the method's own accounting; None if it keeps none."""
        return None

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Frees what it holds."""


def exchange_all(exchange: Exchange, buckets: Sequence[Bucket]) -> None:
    """As DDP does it: start every bucket, then wait for each; the averages end in the buckets."""

    def finish(bucket: Bucket, future: torch.futures.Future[Tensor]) -> None:
        result = future.wait()
        if result.data_ptr() != bucket.buffer().data_ptr():
            bucket.buffer().copy_(result.view(-1))

    if exchange.one_by_one:
        for bucket in buckets:
            finish(bucket, exchange.hook(bucket))
        return
    futures = [exchange.hook(bucket) for bucket in buckets]
    for bucket, future in zip(buckets, futures, strict=True):
        finish(bucket, future)


@dataclass(frozen=True)
class Method:
    """How to make an exchange for a density, and how many bytes its arithmetic makes each rank receive."""

    name: str
    title: str
    make: Callable[[float], Exchange]
    theory: Callable[[int, Sequence[Bucket], float], float]
    ours: bool = False
    lossy: float = 0.0
    """Relative error of one rounding on the wire; 0 for float32 or for error feedback, which loses nothing."""


def count(numel: int, density: float) -> int:
    """Elements that a density stands for.

    >>> count(1000, 0.01), count(10, 0.01)
    (10, 1)
    """
    return max(1, round(numel * density))


def ring(ranks: int, nbytes: float) -> float:
    """Bytes received by each rank in a bandwidth-optimal all-reduce (Patarasuk & Yuan 2009).

    >>> ring(8, 100)
    175.0
    """
    return 2 * (ranks - 1) / ranks * nbytes


def numel_of(buckets: Sequence[Bucket]) -> int:
    return sum(bucket.buffer().numel() for bucket in buckets)


def selected(buckets: Sequence[Bucket], density: float) -> int:
    return sum(count(bucket.buffer().numel(), density) for bucket in buckets)

"""What the gradient benchmarks exchange: ResNet-50's parameters, cut into DDP's buckets, filled with synthetic values.

The shapes are real. The values are not: they are drawn so that they are as hard as real gradients where it matters to
a sparse exchange. They are heavy-tailed (a normal times a log-normal), of a scale of its own in every parameter, new in
every step, and only partly shared by the workers (correlation :data:`CORRELATION` between any two of them), so that
workers agree on some of the largest entries and not on others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from math import cos, prod, sin, sqrt

import torch
from torch import Tensor

from thinwire.errors import MisuseError

__all__ = ["CORRELATION", "Bucket", "Workload", "bucket_sizes", "cut", "resnet50_shapes"]

CORRELATION = 0.36
"""Between the gradients of two workers in one step."""

_MIB = 1 << 20
_FIRST_BUCKET_BYTES = _MIB  # DDP sends a small bucket first, to start early
_TURN = 0.3  # radians by which the common part turns in a step
_SCALE = 1e-3


def resnet50_shapes(width: int = 64) -> tuple[tuple[int, ...], ...]:
    """The parameters of ResNet-50 in the order of its definition (He et al. 2016, as torchvision has them).

    ``width`` is the number of channels of the first layer, 64 in the real one; less makes a narrower network.

    >>> shapes = resnet50_shapes()
    >>> len(shapes), sum(prod(shape) for shape in shapes)
    (161, 25557032)

    Raises:
        MisuseError: ``width`` is not positive.
    """
    if width < 1:
        raise MisuseError(f"a width of {width}; give at least 1 (ResNet-50 has 64)", width=width)

    def convolution(out: int, into: int, size: int) -> Iterator[tuple[int, ...]]:
        yield from ((out, into, size, size), (out,), (out,))  # no bias; then a batch norm

    def layers() -> Iterator[tuple[int, ...]]:
        yield from convolution(width, 3, 7)
        into = width
        for stage, blocks in enumerate((3, 4, 6, 3)):
            inner, out = width << stage, 4 * width << stage
            for block in range(blocks):
                yield from convolution(inner, into, 1)
                yield from convolution(inner, inner, 3)
                yield from convolution(out, inner, 1)
                if block == 0:
                    yield from convolution(out, into, 1)
                into = out
        yield from ((1000, into), (1000,))

    return tuple(layers())


def bucket_sizes(shapes: Sequence[tuple[int, ...]], bucket_mb: float) -> list[list[int]]:
    """How DDP groups float32 parameters once it knows in which order their gradients arrive: the last layer's first.

    Positions in ``shapes``, one list a bucket: a first one of 1 MiB, then of ``bucket_mb`` MiB, each closed by the
    parameter that fills it. 0 makes one bucket of all.

    >>> bucket_sizes([(1000,), (300_000,), (100_000,)], 1)
    [[2, 1], [0]]
    """
    order = list(reversed(range(len(shapes))))
    if not bucket_mb:
        return [order]
    buckets: list[list[int]] = [[]]
    size, limit = 0, _FIRST_BUCKET_BYTES
    for position in order:
        buckets[-1].append(position)
        size += 4 * prod(shapes[position])
        if size >= limit:
            buckets.append([])
            size, limit = 0, int(bucket_mb * _MIB)
    return [bucket for bucket in buckets if bucket]


class Bucket:
    """What DDP hands to a communication hook. ``torch.distributed.GradBucket`` cannot be made from Python."""

    def __init__(self, index: int, is_last: bool, flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
        self._index, self._is_last, self._flat = index, is_last, flat
        parts = torch.split(flat, [prod(shape) for shape in shapes])
        self._gradients = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self._parameters = [gradient.detach() for gradient in self._gradients]

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._is_last

    def buffer(self) -> Tensor:
        return self._flat

    def set_buffer(self, buffer: Tensor) -> None:
        """DDP takes the result from wherever the hook says; here it is to end in place."""
        self._flat.copy_(buffer)

    def gradients(self) -> list[Tensor]:
        return self._gradients

    def parameters(self) -> list[Tensor]:
        """Tensors of the parameters' shapes, the same ones every time."""
        return self._parameters


def cut(flat: Tensor, shapes: Sequence[tuple[int, ...]], bucket_mb: float) -> list[Bucket]:
    """The buckets of a flat tensor that holds parameters of these shapes, the last one first.

    >>> [bucket.buffer().numel() for bucket in cut(torch.empty(700_000, device="meta"), [(400_000,), (300_000,)], 1)]
    [300000, 400000]
    """
    groups = [[shapes[i] for i in group] for group in bucket_sizes(shapes, bucket_mb)]
    parts = torch.split(flat, [sum(prod(shape) for shape in group) for group in groups])
    return [
        Bucket(i, i == len(groups) - 1, part, group) for i, (part, group) in enumerate(zip(parts, groups, strict=True))
    ]


@dataclass(frozen=True, slots=True)
class _Parts:
    common: tuple[Tensor, Tensor]
    noise: Tensor
    scales: list[float]


class Workload:
    """One worker's gradients: ``flat`` (float32 ``[numel]``) and its buckets, filled anew by :meth:`fill`.

    >>> workload = Workload(resnet50_shapes(2), bucket_mb=25, rank=0, seed=0)
    >>> workload.numel == sum(prod(shape) for shape in resnet50_shapes(2)) == workload.flat.numel()
    True
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], bucket_mb: float, rank: int, seed: int) -> None:
        self._shapes, self._bucket_mb, self._seed = tuple(shapes), bucket_mb, seed
        self.numel = sum(prod(shape) for shape in shapes)
        self._make_buckets()
        same = torch.Generator().manual_seed(seed)
        scales = torch.randn(len(shapes), generator=same).exp().mul(_SCALE).tolist()
        common = (self._heavy_tailed(same), self._heavy_tailed(same))
        own = torch.Generator().manual_seed(seed + 1_000_003 * (rank + 1))
        self._parts = _Parts(common, self._heavy_tailed(own), scales)

    def beside(self, rank: int) -> Workload:
        """Another worker in the same memory: its noise is this one's, from other places."""
        other = copy(self)
        other._seed = self._seed + 40_503 * rank * (self.numel // 65_536 + 1)
        other._make_buckets()
        return other

    def _make_buckets(self) -> None:
        self.flat = torch.zeros(self.numel)
        self.buckets = cut(self.flat, self._shapes, self._bucket_mb)

    def _heavy_tailed(self, generator: torch.Generator) -> Tensor:
        """A normal times a log-normal, of unit variance: kurtosis 3 exp(4 s^2), 39 for s = 0.8."""
        spread = 0.8
        width = torch.randn(self.numel, generator=generator).mul_(spread).exp_()
        return torch.randn(self.numel, generator=generator).mul_(width).div_(sqrt(torch.e ** (2 * spread**2)))

    def fill(self, step: int) -> None:
        """This worker's gradients of ``step``, the same ones whenever it is asked for them."""
        first, second = self._parts.common
        torch.mul(first, sqrt(CORRELATION) * cos(_TURN * step), out=self.flat)
        self.flat.add_(second, alpha=sqrt(CORRELATION) * sin(_TURN * step))
        place = (self._seed + step * 2_654_435_761) % self.numel  # new noise: the old one from another place
        noise, rest = self._parts.noise, sqrt(1 - CORRELATION)
        self.flat[place:].add_(noise[: self.numel - place], alpha=rest)
        self.flat[:place].add_(noise[self.numel - place :], alpha=rest)
        gradients = (gradient for bucket in self.buckets for gradient in bucket.gradients())
        for gradient, scale in zip(gradients, self._parts.scales, strict=True):
            gradient.mul_(scale)

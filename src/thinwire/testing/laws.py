"""What the contracts of compressors and of value codecs share: claims, updates to try, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.compress.base import Layout, Packet

__all__ = [
    "EDGES",
    "LAYOUT",
    "Claims",
    "assert_close_on_average",
    "quick",
    "received",
    "same",
    "squared_norm",
    "updates",
]

LAYOUT = Layout(((24, 10), (24,), (6, 5, 4), (), (7, 1)))

quick = settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Claims:
    """What an implementation promises beyond the common laws.

    - ``contraction``: a δ in [0, 1] with ``||x - decode(encode(x))||² <= (1 - δ) ||x||²`` for every x, at the first
      step. Error feedback needs one above 0 (Karimireddy et al. 2019, definition 2). None: no such promise.
    - ``unbiased``: the expected value of ``decode(encode(x))`` over steps (of a codec: over seeds) is x.
    - ``exact``: ``decode(encode(x))`` is x, bit for bit.
    """

    contraction: float | None = None
    unbiased: bool = False
    exact: bool = False


@st.composite
def updates(draw: st.DrawFn, numel: int) -> Tensor:
    """Finite float32 ``[numel]``: normal, heavy-tailed or sparse, of any usual scale, with some values of its own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.randn(numel, generator=generator)
    if draw(st.booleans()):
        values = values**3 / torch.rand(numel, generator=generator).clamp_(min=1e-3)
    values *= torch.rand(numel, generator=generator) < draw(st.sampled_from([1.0, 0.3, 0.01]))
    values *= 10.0 ** draw(st.integers(-12, 12))
    own = st.floats(-(2.0**100), 2.0**100, width=32)
    for position, value in draw(st.dictionaries(st.integers(0, max(0, numel - 1)), own, max_size=5)).items():
        if position < numel:
            values[position] = value
    return values


EDGES: list[tuple[str, Callable[[int], Tensor]]] = [
    ("zeros", lambda numel: torch.zeros(numel)),
    ("minus zeros", lambda numel: -torch.zeros(numel)),
    ("ones", lambda numel: torch.ones(numel)),
    ("one of many", lambda numel: torch.nn.functional.one_hot(torch.tensor(numel // 2), max(1, numel))[:numel].float()),
    ("huge", lambda numel: torch.linspace(-1e30, 1e30, numel)),
    ("denormal", lambda numel: torch.linspace(-1e-40, 1e-40, numel)),
    ("the smallest", lambda numel: torch.full((numel,), 1.4e-45)),
    ("of all scales", lambda numel: torch.logspace(-44, 30, numel) * (-1.0) ** torch.arange(numel)),
]
"""Updates that divide by zero, overflow or underflow where a compressor is careless."""


def same(first: Any, second: Any) -> bool:
    """Whether two states, packets or tensors are equal bit for bit."""
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and (first.dtype, first.shape, first.device) == (second.dtype, second.shape, second.device)
            and torch.equal(
                first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8)
            )
        )
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    if is_dataclass(first):
        return type(first) is type(second) and all(
            same(getattr(first, f.name), getattr(second, f.name)) for f in fields(first)
        )
    return bool(first == second)


def received(packet: Packet) -> Packet:
    """The packet as it arrives: copied bytes, somewhere inside a message, at an odd address."""
    message = torch.cat([packet.data.new_zeros(3), packet.data, packet.data.new_zeros(2)])
    return Packet(packet.numel, message[3 : 3 + packet.nbytes])


def squared_norm(values: Tensor) -> float:
    return float(values.double().square().sum())


def assert_close_on_average(draws: list[Tensor], expected: Tensor) -> None:
    """The mean is within seven standard errors, and what rounding adds, of what is expected."""
    values = torch.stack(draws).double()
    error = (values.mean(0) - expected.double()).abs()
    standard = values.std(0) / len(draws) ** 0.5
    # An outcome of probability p that never came up leaves the spread at zero: it could be as rare as 1 / draws.
    allowed = (
        7 * standard + expected.double().abs() * 1e-5 + float(expected.abs().max()) * 20 / len(draws) * (standard == 0)
    )
    assert bool((error <= allowed).all()), f"off by {float((error / allowed).max()):.2f} times what chance allows"

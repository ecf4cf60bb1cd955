"""Every way of selecting gives what sorting everything gives, whatever the values, hints and threads."""

from __future__ import annotations

from math import inf, isnan, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.tensors import select_oracle, select_stripes
from thinwire.tensors.select import Selection, top_k

KINDS = ("normal", "heavy", "ties", "equal", "zeros", "denormal", "hostile", "rising", "signed zeros")
HINTS = (None, 0.0, -0.0, -1.0, nan, inf, 1e-300, 1e300, 1e-42, 1.0)
LARGE = select_stripes._SMALL * 40  # elements with which samples, stripes and threads come into play


def values(kind: str, numel: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=random)
    if kind == "heavy":
        x = x / torch.randn(numel, generator=random)
    elif kind == "ties":
        x = torch.randint(-3, 4, (numel,), generator=random).float()
    elif kind == "equal":
        x = torch.full((numel,), -2.0)
    elif kind == "zeros":
        x = x * (torch.rand(numel, generator=random) < 0.002)
    elif kind == "denormal":
        x = x * 1e-40
    elif kind == "hostile":
        x[::97], x[5::101], x[7::103] = nan, -inf, inf
    elif kind == "rising":
        x = x.abs().sort().values
    elif kind == "signed zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    return x


def check(found: Selection, x: torch.Tensor, k: int) -> None:
    want = select_oracle.top_k(x, k)
    assert found.indices.dtype == torch.int32
    assert torch.equal(found.indices, want)
    smallest = select_oracle.keys(x)[want.long()].min() if k else torch.tensor(0x7F80_0000, dtype=torch.int32)
    smallest = smallest.view(torch.float32)
    assert found.threshold == smallest or (isnan(found.threshold) and smallest.isnan())
    assert found.finite is bool(x.isfinite().all())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@given(
    kind=st.sampled_from(KINDS),
    numel=st.integers(0, 300),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    hint=st.sampled_from(HINTS),
)
@settings(deadline=None)
def test_small(kind: str, numel: int, share: float, seed: int, hint: float | None) -> None:
    x, k = values(kind, numel, seed), round(share * numel)
    check(top_k(x, k, hint=hint), x, k)


@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=200), share=st.floats(0, 1))
@settings(deadline=None)
def test_any_bits(bits: list[int], share: float) -> None:
    x, k = torch.tensor(bits, dtype=torch.int32).view(torch.float32), round(share * len(bits))
    check(top_k(x, k), x, k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0, 1e-5, 0.001, 0.01, 0.3, 1])
def test_large(kind: str, share: float) -> None:
    x = values(kind, LARGE + 13, 1)
    k = round(share * x.numel())
    want = select_oracle.keys(x)[select_oracle.top_k(x, k).long()].view(torch.float32)
    threshold = float(want.min()) if k else 1.0
    for threads in (1, 2, 3):
        check(top_k(x, k, threads=threads), x, k)
    for wrong in (1.0, 0.95, 0.5, 1.05, 2.0):
        check(top_k(x, k, hint=wrong * threshold, threads=2), x, k)

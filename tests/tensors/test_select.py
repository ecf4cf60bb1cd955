"""Every way of selecting gives what sorting everything gives, whatever the values, hints and threads."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isnan, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.tensors import select_oracle, select_stripes, select_torch
from thinwire.tensors.select import Selection, accumulate_top_k, at_least, fill_sparse_, top_k

KINDS = ("normal", "heavy", "ties", "equal", "zeros", "denormal", "hostile", "rising", "signed zeros")
HINTS = (None, 0.0, -0.0, -1.0, nan, inf, 1e-300, 1e300, 1e-42, 1.0)
LARGE = select_stripes._SMALL * 40  # elements with which samples, stripes and threads come into play


@pytest.fixture(autouse=True, scope="module")
def _short_stripes() -> Iterator[None]:
    """Several threads even for what one would do at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_stripes, "_STRIPE_MIN", 1 << 16)
        yield


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


def check(found: Selection, x: torch.Tensor, k: int, want: torch.Tensor | None = None) -> None:
    want = select_oracle.top_k(x, k) if want is None else want
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
def test_small(kind: str, numel: int, share: float, seed: int, hint: float | None) -> None:
    x, k = values(kind, numel, seed), round(share * numel)
    check(top_k(x, k, hint=hint), x, k)


@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=200), share=st.floats(0, 1))
def test_any_bits(bits: list[int], share: float) -> None:
    x, k = torch.tensor(bits, dtype=torch.int32).view(torch.float32), round(share * len(bits))
    check(top_k(x, k), x, k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0, 1e-5, 0.001, 0.01, 0.3, 1])
def test_large(kind: str, share: float) -> None:
    x = values(kind, LARGE + 13, 1)
    k = round(share * x.numel())
    want = select_oracle.top_k(x, k)
    threshold = float(select_oracle.keys(x)[want.long()].view(torch.float32).min()) if k else 1.0
    for threads in (1, 3):
        check(top_k(x, k, threads=threads), x, k, want)
    for wrong in (1.0, 0.95, 0.5, 1.05, 2.0):
        check(top_k(x, k, hint=wrong * threshold, threads=2), x, k, want)


@given(
    kind=st.sampled_from(KINDS),
    numel=st.sampled_from([1, 63, 64, 65, 1000, LARGE]),
    seed=st.integers(0, 99),
    scales=st.sampled_from([(1.0, 1.0), (0.37, 1.3), (1 / 3, 0.0), (-1e-20, 3e20)]),
    hint=st.sampled_from(HINTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    threads=st.integers(1, 3),
)
@settings(max_examples=40)
def test_accumulating_selects_from_the_sum(
    kind: str,
    numel: int,
    seed: int,
    scales: tuple[float, float],
    hint: float | None,
    dtype: torch.dtype,
    threads: int,
) -> None:
    gradient, residual = values(kind, numel, seed).to(dtype), values("heavy", numel, seed + 1)
    want, k = select_oracle.accumulate(gradient, residual, *scales), numel // 100
    before, out = residual.clone(), torch.full_like(residual, nan)
    options = {"hint": hint, "gradient_scale": scales[0], "residual_scale": scales[1], "threads": threads}
    check(accumulate_top_k(gradient, residual, k, out=out, **options), want, k)
    assert same_bits(residual, before)
    numbers = ~want.isnan()  # whose payload depends on the order of the operands
    assert torch.equal(numbers, ~out.isnan())
    assert same_bits(out[numbers], want[numbers])
    check(accumulate_top_k(gradient, residual, k, **options), want, k)
    assert same_bits(residual[numbers], want[numbers])


def test_accumulating_into_the_gradient() -> None:
    gradient, residual = values("normal", LARGE, 1), values("heavy", LARGE, 2)
    want = gradient + residual
    check(accumulate_top_k(gradient, residual, 99, out=gradient), want, 99)
    assert same_bits(gradient, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numel", [0, 1, 65, LARGE + 1])
def test_at_least(kind: str, numel: int) -> None:
    x = values(kind, numel, 5)
    for threshold in (0.0, 1e-41, 0.5, 3.0, inf):
        want = select_oracle.at_least(x, threshold)
        assert torch.equal(at_least(x, threshold, threads=2), want)
        for cap in (0, 1, want.numel() // 2, want.numel(), numel):
            capped = want if want.numel() <= cap else select_oracle.top_k(x, cap)
            assert torch.equal(at_least(x, threshold, cap=cap, threads=2), capped)


@pytest.mark.parametrize("numel", [0, 1, 65, LARGE + 1])
@pytest.mark.parametrize("share", [0, 0.01, 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_fill_sparse_writes_these_and_zeros(numel: int, share: float, threads: int) -> None:
    indices = torch.nonzero(torch.rand(numel) < share).flatten().int()
    written = torch.randint(-(2**31), 2**31, (indices.numel(),)).int().view(torch.float32)  # any bits, NaN too
    want = torch.zeros(numel)
    want[indices.long()] = written
    out = torch.full((numel,), nan)
    assert fill_sparse_(out, indices, written, threads=threads) is out
    assert same_bits(out, want)


@pytest.mark.parametrize("bad", [[-1, 2], [2, 1], [1, 1], [0, LARGE], [LARGE - 1, 0], [LARGE - 1, 2**31 - 1]])
def test_fill_sparse_refuses_indices_that_do_not_increase_within(bad: list[int]) -> None:
    guarded = torch.full((LARGE + 200,), 7.0)
    for threads in (1, 3):
        with pytest.raises(MisuseError, match="indices"):
            fill_sparse_(guarded[100:-100], torch.tensor(bad, dtype=torch.int32), torch.ones(2), threads=threads)
    assert bool((guarded[:100] == 7).all() and (guarded[-100:] == 7).all())


@given(lengths=st.lists(st.integers(0, 50), max_size=6), share=st.floats(0, 1))
def test_segments_are_selected_from_one_by_one(lengths: list[int], share: float) -> None:
    x, counts = values("ties", sum(lengths), 3), [round(share * length) for length in lengths]
    found = top_k(x, counts, segments=lengths)
    want = [select_oracle.top_k(part, k) for part, k in zip(x.split(lengths), counts, strict=True)] if lengths else []
    offsets = [sum(lengths[:i]) for i in range(len(lengths))]
    assert found.indices.tolist() == [o + int(i) for o, part in zip(offsets, want, strict=True) for i in part]
    assert found.indices.dtype == torch.int32
    assert found.threshold == min((float(x[found.indices.long()].abs().min()), inf) if sum(counts) else (inf,))


def test_misuse_is_refused() -> None:
    x, y = torch.zeros(10), torch.zeros(9)
    huge = torch.zeros(1).expand(2**31)
    calls = [
        lambda: top_k(x, 11),
        lambda: top_k(x, -1),
        lambda: top_k(x.double(), 1),
        lambda: top_k(x.view(2, 5), 1),
        lambda: top_k(x[::2], 1),
        lambda: top_k(huge, 1),
        lambda: top_k(torch.zeros(10, device="meta"), 1),
        lambda: top_k(x, 1, threads=0),
        lambda: top_k(x, [1, 1]),
        lambda: top_k(x, 1, segments=[10]),
        lambda: top_k(x, [1, 1], segments=[5, 4]),
        lambda: top_k(x, [0, 1, 1], segments=[-1, 5, 6]),
        lambda: accumulate_top_k(x, y, 1),
        lambda: accumulate_top_k(x, x.bfloat16(), 1),
        lambda: accumulate_top_k(x, torch.zeros(10), 1, out=y),
        lambda: accumulate_top_k(x[:8], torch.zeros(8), 1, out=x[1:9]),
        lambda: accumulate_top_k(torch.zeros(8), x[:8], 1, out=x[2:]),
        lambda: at_least(x, nan),
        lambda: at_least(x, -1.0),
        lambda: at_least(x, 1.0, cap=-1),
        lambda: fill_sparse_(x, torch.zeros(1, dtype=torch.int64), torch.ones(1)),
        lambda: fill_sparse_(x, torch.zeros(1, dtype=torch.int32), torch.ones(2)),
    ]
    for call in calls:
        with pytest.raises(MisuseError):
            call()


@pytest.mark.parametrize("kind", KINDS)
def test_torch_operations_give_the_same(kind: str) -> None:
    x = values(kind, 3001, 4)
    for k in (0, 1, 30, 3001):
        indices, key, finite = select_torch.top_k(x, k)
        assert torch.equal(indices, select_oracle.top_k(x, k))
        assert key == (select_oracle.keys(x)[indices.long()].min() if k else 0x7F80_0000)
        assert finite is bool(x.isfinite().all())
    for cap in (None, 5):
        assert torch.equal(select_torch.at_least(x, 0.5, cap), at_least(x, 0.5, cap=cap))

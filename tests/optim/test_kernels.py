"""The compiled loops give the oracle's bits, for every data type, and round halves as torch does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.optim import kernels, oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@given(st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.sampled_from(["adam", "sgd", "nesterov"]), st.data())
def test_a_step_is_the_oracles(
    dtype: torch.dtype, masters: bool, maximize: bool, style: str, data: st.DataObject
) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    n, scale = data.draw(st.integers(0, 300)), data.draw(st.sampled_from([1e-30, 1e-6, 1.0, 1e4]))
    weights = (torch.randn(n, generator=random) * scale).to(dtype)
    positions = (torch.rand(n, generator=random) < 0.3).nonzero().flatten().int()
    k = positions.numel()
    gradient, m = torch.randn(k, generator=random), torch.randn(k, generator=random)
    v, entered = torch.rand(k, generator=random), torch.randint(1, 8, (k,), generator=random, dtype=torch.int32)
    own = weights[positions.long()].float() if masters else None
    ages = torch.arange(6, dtype=torch.float64)
    rates, corrections = (1e-2 / (1 - 0.9**ages)).float(), (1 - 0.99**ages).sqrt().float()
    ends = []
    for form in (kernels, oracle):
        state = [x.clone() if x is not None else None for x in (weights, m, v, own)]
        w, first, second, held = state
        assert w is not None
        assert first is not None
        assert second is not None
        if style == "adam":
            adam = oracle.AdamStep(rates, corrections, 0.9, 0.99, 1e-8, 0.999, maximize)
            form.adam(w, positions, gradient, first, second, entered, 7, adam, held)
        else:
            sgd = oracle.SGDStep(0.01, 0.9, 0.1, 0.01, style == "nesterov", 0.99, maximize)
            form.sgd(w, positions, gradient, first, second, entered, 7, sgd, held)
        ends.append(state)
    for ours, readable in zip(*ends, strict=True):
        assert ours is None or readable is None or torch.equal(bits(ours), bits(readable))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_right(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()].contiguous()
    positions = torch.arange(finite.numel(), dtype=torch.int32)
    found, fine = kernels.gather(finite, positions)
    assert fine
    assert torch.equal(bits(found), bits(finite.float()))
    assert not kernels.gather(every, torch.arange(2**16, dtype=torch.int32))[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    some = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=random, dtype=torch.int64).int().view(torch.float32)
    near = torch.randn(100_000, generator=random) * 1e-5
    new = torch.cat((some[some.isfinite()], near))
    n = new.numel()
    weights, positions = torch.zeros(n, dtype=dtype), torch.arange(n, dtype=torch.int32)
    nothing, entered = torch.zeros(n), torch.ones(n, dtype=torch.int32)
    still = oracle.SGDStep(0.0, 0.0, 0.0, 0.0, False, 0.9)
    kernels.sgd(weights, positions, nothing, nothing.clone(), nothing.clone(), entered, 1, still, new.clone())
    assert torch.equal(bits(weights), bits((new + 0.0).to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_histogram_counts_all(dtype: torch.dtype) -> None:
    x = torch.randn(10_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys = (x.float().view(torch.int32) & 0x7FFF_FFFF) >> 16
    assert torch.equal(torch.from_numpy(kernels.histogram(x)), torch.bincount(keys, minlength=1 << 15))


@given(st.data())
def test_the_parts_of_a_selection_are_the_oracles(data: st.DataObject) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    n, share = data.draw(st.integers(0, 200)), data.draw(st.sampled_from([0.0, 0.2, 1.0]))
    cells = torch.randperm(300, generator=random)[:n].sort().values.int()
    inside = torch.rand(n, generator=random) < share
    old, rest = cells[inside], cells[~inside]
    stay = torch.rand(old.numel(), generator=random) < 0.5
    values = [
        (torch.randn(old.numel(), generator=random), torch.randn(rest.numel(), generator=random)),
        (old + 1, torch.zeros_like(rest)),
    ]
    for ours, readable in zip(
        kernels.merged(old, stay, rest, values), oracle.merged(old, stay, rest, values), strict=True
    ):
        assert torch.equal(ours, readable)
    assert torch.equal(kernels.absent(old, cells), oracle.absent(old, cells))
    assert torch.equal(kernels.absent(old, cells), rest)
    v, entered = torch.rand(n, generator=random), torch.randint(1, 8, (n,), generator=random).int()
    table = (1 - 0.99 ** torch.arange(6, dtype=torch.float64)).sqrt().float()
    ours, readable = (form.importance(v, entered, 7, table, 1.7) for form in (kernels, oracle))
    assert torch.equal(bits(ours), bits(readable))


def test_threads_do_not_change_the_answer() -> None:
    n = 400_000
    x, at = torch.randn(n, generator=torch.Generator().manual_seed(0)), torch.arange(n, dtype=torch.int32)
    before = torch.get_num_threads()
    try:
        ends = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            w, m, v = x.clone(), torch.zeros(n), torch.zeros(n)
            step = oracle.SGDStep(0.1, 0.9, 0.0, 0.0, False, 0.9)
            kernels.sgd(w, at, x, m, v, torch.ones(n, dtype=torch.int32), 2, step)
            ends.append(torch.cat((w, m, v)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*ends)


def test_other_types_are_refused() -> None:
    with pytest.raises(MisuseError, match="float64"):
        kernels.gather(torch.zeros(3, dtype=torch.float64), torch.zeros(1, dtype=torch.int32))

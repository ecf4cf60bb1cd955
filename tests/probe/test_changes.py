"""The fused comparison, its torch version and the readable one agree on any bits; results of parts add up."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import inf, isnan, nan

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.probe.tensors import FLOATS, pairs
from thinwire.errors import MisuseError, UnsupportedError
from thinwire.probe import changes as changes_module
from thinwire.probe.change_torch import compare_on_device
from thinwire.probe.changes import Changes, Limits, compare, ulp_bin_label
from thinwire.probe.oracle import compare_slowly, ulp_bin
from thinwire.tensors.bits import cells_of
from thinwire.tensors.oracle import changed_positions

limits = st.builds(
    Limits, absolute=st.sampled_from([0.0, 1e-3, 1.0]), relative=st.sampled_from([0.0, 0.01]),
    ulps=st.sampled_from([0, 1, 200]),
)  # fmt: skip


def close(a: Changes, b: Changes) -> None:
    """Counts are equal; sums of floats but for the order of their terms."""
    for name, value in asdict(a).items():
        other = getattr(b, name)
        if isinstance(value, float):
            scale = max(a.total_abs, 1e-300) if name == "total" else 0
            assert value == pytest.approx(other, rel=1e-9, abs=1e-9 * scale, nan_ok=True), name
        else:
            assert value == other, name


@given(pair=pairs(), limits=limits)
def test_all_ways_agree_on_any_bits(pair: tuple[torch.Tensor, torch.Tensor], limits: Limits) -> None:
    old, new = pair
    right = compare_slowly(old, new, limits)
    words = np.full(-(-old.numel() // 64), -1, np.int64).view(np.uint64)
    close(right, compare(old, new, limits, words=words))
    marks = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert np.flatnonzero(marks).tolist() == changed_positions(old, new)
    again = np.full_like(words, 77)
    close(right, Changes(**compare_on_device(old, new, limits, renew=False, words=again)))
    assert np.array_equal(words, again)


@given(pair=pairs(), limits=limits, device=st.booleans())
def test_renewing_makes_the_old_the_new_bit_for_bit(
    pair: tuple[torch.Tensor, torch.Tensor], limits: Limits, device: bool
) -> None:
    old, new = pair[0].clone(), pair[1]
    if device:
        compare_on_device(old, new, limits, renew=True, words=np.empty(0, np.uint64))
    else:
        compare(old, new, limits, renew=True)
    assert np.array_equal(cells_of(old), cells_of(new))


@given(pair=pairs(FLOATS), at=st.integers(0, 500))
def test_the_parts_of_a_tensor_add_up_to_it(pair: tuple[torch.Tensor, torch.Tensor], at: int) -> None:
    old, new = pair
    close(compare(old, new), compare(old[:at], new[:at]) + compare(old[at:], new[at:]) + Changes())


@given(pair=pairs())
def test_limits_only_take_away(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    free = compare(*pair)
    assert free.above == free.changed == sum(free.ulps)
    for power in range(10):  # limits at which bins end
        found = compare(*pair, Limits(ulps=2**power))
        assert (found.changed, found.ulps) == (free.changed, free.ulps)
        assert found.above == sum(free.ulps[power + 2 :])


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(3001, generator=generator).bfloat16()
    new = torch.where(torch.rand(3001, generator=generator) < 0.3, old * 1.1, old)
    whole, words = compare(old, new), np.zeros(47, np.uint64)
    monkeypatch.setattr(changes_module, "BLOCK", 128)
    close(whole, compare(old, new, words=words))
    assert np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist() == changed_positions(
        old, new
    )


def test_what_is_not_a_number_is_counted_and_left_out_of_the_sums() -> None:
    old = torch.tensor([1.0, nan, inf, 0.0, 3.0, -inf])
    new = torch.tensor([nan, 1.0, inf, -0.0, inf, inf])
    found = compare(old, new, Limits(absolute=1e30))
    assert (found.changed, found.odd, found.new_nan, found.new_inf) == (5, 4, 1, 1)
    assert found.above == 4  # an undefined difference is within no limit, a difference of 0.0 is
    assert found.max_abs == found.total == found.update_ratio == 0.0
    payload = torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32).view(torch.float32)
    assert compare(payload[:1], payload[1:]).changed == 1
    assert compare(payload[:1], payload[:1].clone()).changed == 0


def test_statistics_are_those_of_the_changed_elements() -> None:
    old, new = torch.zeros(10), torch.zeros(10)
    new[:4] = torch.tensor([1.0, -3.0, 2.0, 2.0])
    found = compare(old, new)
    assert (found.mean, found.mean_abs, found.max_abs) == (0.5, 2.0, 3.0)
    assert found.std == pytest.approx(new[:4].std(correction=0).item())
    assert found.std_abs == pytest.approx(0.5**0.5)
    assert (found.density, found.sparsity, found.update_ratio) == (0.4, 0.6, 1.0)
    assert compare(new, old).update_ratio == inf
    nothing = compare(old[:0], new[:0])
    assert (nothing.density, nothing.sparsity, nothing.mean, nothing.std, nothing.update_ratio) == (0, 1, 0, 0, 0)
    unknown = found + replace(Changes(), total=nan, total_abs=nan, squares=nan, max_abs=nan, weight_squares=nan)
    assert all(isnan(v) for v in (unknown.mean, unknown.std, unknown.std_abs, unknown.max_abs, unknown.update_ratio))


def test_shapes_layouts_and_kinds() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert compare(matrix.t(), matrix.t() + 1).changed == 12
    assert compare(torch.tensor(1.0), torch.tensor(2.0)).elements == 1
    complex_ = torch.tensor([1 + 2j, 3 + 4j])
    assert compare(complex_, complex_ + 1j).changed == 2
    assert compare(complex_, complex_ + 1j).elements == 4
    assert compare(complex_.conj(), complex_).changed == 2
    assert compare(torch.tensor([True, False]), torch.tensor([False, False])).changed == 1
    parameter = torch.nn.Parameter(torch.ones(3))
    assert compare(parameter, parameter.detach() + 1).changed == 3


def test_misuse_is_refused() -> None:
    ones = torch.ones(3)
    for other in (torch.ones(4), torch.ones(3).double(), torch.ones(3, device="meta"), torch.ones(3, 1)):
        with pytest.raises(MisuseError):
            compare(ones, other)
    with pytest.raises(MisuseError, match="words"):
        compare(ones, ones, words=np.zeros(2, np.uint64))
    with pytest.raises(MisuseError, match="contiguous"):
        compare(torch.ones(3, 2).t(), torch.ones(2, 3), renew=True)
    with pytest.raises(MisuseError):
        compare(ones.to_sparse(), ones.to_sparse())
    with pytest.raises(UnsupportedError):
        compare(ones.to(torch.float8_e8m0fnu), ones.to(torch.float8_e8m0fnu))
    for bad in (nan, inf, -1.0):
        with pytest.raises(MisuseError):
            Limits(absolute=bad)


@given(distance=st.integers(1, 2**64 - 1))
@example(distance=2**63)
def test_bins_are_named_after_the_distances_they_hold(distance: int) -> None:
    label = ulp_bin_label(ulp_bin(distance))
    low, high = (label.split("-") * 2)[:2]
    assert int(low) <= distance <= int(high)

"""Index coding: exact, its fast path equal to the readable one, close to the entropy, and safe on any bytes."""

from __future__ import annotations

from math import log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compress.indices import pack, pack_oracle, packed_size, unpack, unpack_oracle
from thinwire.errors import MalformedError


@st.composite
def positions(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    numel = draw(st.integers(1, 5000) | st.sampled_from([2**31 - 1, 2**20, 64, 63, 65]))
    chosen = draw(st.sets(st.integers(0, numel - 1), max_size=200))
    if draw(st.booleans()) and numel <= 5000:
        chosen = set(range(numel)) - chosen  # dense ones too
    return torch.tensor(sorted(chosen), dtype=torch.int32), numel


@given(positions())
def test_what_is_packed_comes_back_and_both_versions_agree(case: tuple[torch.Tensor, int]) -> None:
    chosen, numel = case
    count = chosen.numel()
    if numel > 5000 and count < 2:
        chosen, count = torch.arange(0, numel, numel // 100, dtype=torch.int32)[:100], 100 if numel >= 100 else count
        chosen = chosen[:count]
        count = chosen.numel()
    data = pack(chosen, numel)
    assert data.numel() == packed_size(count, numel)
    if numel <= 2**20 or count > 50:  # the bitmap of a few positions is small; the readable version's is too
        assert torch.equal(data, pack_oracle(chosen, numel))
        assert torch.equal(unpack_oracle(data, count, numel), chosen)
    assert torch.equal(unpack(data, count, numel), chosen)


@pytest.mark.parametrize("density", [0.3, 0.1, 0.01, 0.001, 0.0001])
def test_size_is_close_to_the_entropy_of_a_random_set(density: float) -> None:
    numel = 10_000_000
    count = int(numel * density)
    entropy = -(density * log2(density) + (1 - density) * log2(1 - density)) / density
    assert entropy <= packed_size(count, numel) * 8 / count <= entropy + 0.6


@settings(max_examples=300)
@given(positions(), st.binary(min_size=1, max_size=8), st.integers(0, 2**16))
def test_any_bytes_are_refused_or_are_sorted_positions(
    case: tuple[torch.Tensor, int], noise: bytes, where: int
) -> None:
    chosen, numel = case
    if numel > 5000:
        return
    data = pack(chosen, numel)
    if data.numel() == 0:
        return
    for j, byte in enumerate(noise):
        data[(where + j) % data.numel()] ^= byte
    outcomes = []
    for read in (unpack, unpack_oracle):
        try:
            got = read(data, chosen.numel(), numel)
        except MalformedError:
            outcomes.append(None)
        else:
            assert bool((got[1:] > got[:-1]).all())
            assert got.numel() == 0 or (int(got[0]) >= 0 and int(got[-1]) < numel)
            outcomes.append(got.tolist())
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_length_is_refused(change: int) -> None:
    data = pack(torch.tensor([1, 5, 900], dtype=torch.int32), 1000)
    data = data[:change] if change < 0 else torch.cat([data, data[:1]])
    with pytest.raises(MalformedError, match="3 positions"):
        unpack(data, 3, 1000)
    with pytest.raises(MalformedError):
        unpack(data, 1001, 1000)

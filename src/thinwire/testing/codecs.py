"""The contract of a value codec, as tests that run on any implementation (see :mod:`thinwire.testing.compressors`)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.compress.base import Packet
from thinwire.compress.values import ValueCodec
from thinwire.errors import MalformedError
from thinwire.testing.laws import (
    EDGES,
    Claims,
    assert_close_on_average,
    quick,
    received,
    same,
    squared_norm,
    updates,
)

__all__ = ["ValueCodecContract"]


class ValueCodecContract:
    """What sparse packets and :class:`~thinwire.compress.quantize.Quantize` rely on.

    Fixtures: ``codec``, required; ``claims`` and ``device`` where the defaults do not fit.
    """

    COUNTS = (0, 1, 2, 3, 5, 7, 8, 9, 31, 255, 256, 257, 511, 512, 513, 1500)

    @pytest.fixture
    def codec(self) -> ValueCodec:
        raise NotImplementedError("give the subclass a fixture 'codec'")

    @pytest.fixture
    def claims(self) -> Claims:
        return Claims()

    @pytest.fixture
    def device(self) -> str:
        return "cpu"

    def test_size_follows_from_the_count(self, codec: ValueCodec, device: str) -> None:
        for count in self.COUNTS:
            values = torch.linspace(-2, 1, count).to(device)
            before = values.clone()
            data = codec.encode(values, seed=count)
            assert (data.dtype, data.shape, data.device) == (torch.uint8, (codec.size(count),), values.device)
            decoded = codec.decode(data, count)
            assert (decoded.dtype, decoded.shape, decoded.device) == (torch.float32, (count,), values.device)
            assert same(values, before)
            assert same(codec.encode(values, seed=count), data)
            assert same(codec.decode(received(Packet(count, data)).data, count), decoded)

    @pytest.mark.parametrize("name", [name for name, _ in EDGES])
    def test_values_at_the_edge(self, codec: ValueCodec, device: str, name: str) -> None:
        for count in self.COUNTS:
            values = dict(EDGES)[name](count).to(device)
            decoded = codec.decode(codec.encode(values, seed=1), count)
            assert bool(decoded.isfinite().all())
            if not values.any():
                assert not decoded.any()

    def test_the_largest_floats_stay_finite(self, codec: ValueCodec, device: str) -> None:
        largest = torch.finfo(torch.float32).max
        for values in (torch.full((700,), largest), torch.tensor([largest, -largest, 1.0])):
            assert bool(codec.decode(codec.encode(values.to(device), seed=1), values.numel()).isfinite().all())

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_crashes_nothing(self, codec: ValueCodec, device: str, bad: float) -> None:
        for values in (torch.full((700,), bad), torch.ones(700).index_fill_(0, torch.tensor(7), bad)):
            assert codec.decode(codec.encode(values.to(device), seed=1), 700).shape == (700,)

    def test_it_is_a_contraction(self, codec: ValueCodec, claims: Claims, device: str) -> None:
        if claims.contraction is None:
            pytest.skip("no contraction is claimed")
        kept = 1 - claims.contraction

        @settings(quick, max_examples=25)
        @given(st.integers(0, 1000).flatmap(updates))
        def law(values: Tensor) -> None:
            decoded = codec.decode(codec.encode(values.to(device), seed=0), values.numel()).cpu()
            assert squared_norm(decoded - values) <= kept * squared_norm(values) * (1 + 1e-5) + 1e-80

        law()

    def test_its_expected_value_is_the_input(self, codec: ValueCodec, claims: Claims, device: str) -> None:
        assert codec.unbiased is claims.unbiased
        if not claims.unbiased:
            pytest.skip("it is not claimed to be unbiased")
        values = torch.randn(600, generator=torch.Generator().manual_seed(1)).to(device)
        draws = [codec.decode(codec.encode(values, seed), 600).cpu() for seed in range(1000)]
        assert_close_on_average(draws, values.cpu())

    def test_every_bit_of_the_seed_counts(self, codec: ValueCodec, claims: Claims, device: str) -> None:
        """Ranks and steps share the seed's bits; torch's generator on a CPU ignores half of them."""
        if not claims.unbiased:
            pytest.skip("it takes no chances")
        values = torch.linspace(-1, 1, 512, device=device)
        plain = codec.encode(values, 5)
        assert not any(torch.equal(codec.encode(values, 5 ^ (1 << bit)), plain) for bit in range(63))

    def test_it_is_exact(self, codec: ValueCodec, claims: Claims, device: str) -> None:
        if not claims.exact:
            pytest.skip("it is not claimed to be exact")
        values = torch.cat([make(100) for _, make in EDGES]).to(device)
        assert same(codec.decode(codec.encode(values, seed=0), values.numel()), values)

    def test_other_sizes_are_refused(self, codec: ValueCodec, device: str) -> None:
        for count in self.COUNTS:
            size = codec.size(count)
            for nbytes in {0, 1, size - 1, size + 1, size + 4, 2 * size + 1} - {size, -1}:
                with pytest.raises(MalformedError):
                    codec.decode(torch.zeros(nbytes, dtype=torch.uint8, device=device), count)
        with pytest.raises(MalformedError):
            codec.decode(torch.zeros(codec.size(8), device=device), 8)

    def test_any_bytes_decode_or_are_refused(self, codec: ValueCodec, device: str) -> None:
        @settings(quick, max_examples=25)
        @given(st.integers(0, 600), st.integers(0, 2**32 - 1))
        def law(count: int, seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            data = torch.randint(0, 256, (codec.size(count),), dtype=torch.uint8, generator=generator).to(device)
            try:
                decoded = codec.decode(data, count)
            except MalformedError:
                return
            assert (decoded.dtype, decoded.shape) == (torch.float32, (count,))

        law()

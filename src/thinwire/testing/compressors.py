"""The contracts of a compressor and of a value codec, as tests that run on any implementation.

Subclass :class:`CompressorContract`, give it a fixture ``compressor``, say what the compressor claims beyond the common
laws, and let pytest collect it::

    class TestMyCompressor(CompressorContract):
        @pytest.fixture
        def compressor(self):
            return MyCompressor()

        @pytest.fixture
        def claims(self):
            return Claims(contraction=0.01)

pytest explains failures better if it may rewrite the assertions here; put
``pytest.register_assert_rewrite("thinwire.testing.compressors")`` into your ``conftest.py``.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.compress.base import Compressor, Layout, Packet, State
from thinwire.errors import MalformedError, MisuseError, ThinwireError
from thinwire.testing.laws import (
    EDGES,
    LAYOUT,
    Claims,
    assert_close_on_average,
    quick,
    received,
    same,
    squared_norm,
    updates,
)

__all__ = ["Claims", "CompressorContract", "same", "updates"]


class CompressorContract:
    """What the sparse all-reduce and the integrations rely on.

    Fixtures: ``compressor``, required; ``claims``, ``layout`` and ``device`` where the defaults do not fit.
    """

    @pytest.fixture
    def compressor(self) -> Compressor:
        raise NotImplementedError("give the subclass a fixture 'compressor'")

    @pytest.fixture
    def claims(self) -> Claims:
        return Claims()

    @pytest.fixture
    def layout(self) -> Layout:
        return LAYOUT

    @pytest.fixture
    def device(self) -> str:
        return "cpu"

    # --- the call ----------------------------------------------------------------------------------------------------

    def test_what_is_decoded_looks_like_the_update(self, compressor: Compressor, layout: Layout, device: str) -> None:
        @quick
        @given(updates(layout.numel))
        def law(update: Tensor) -> None:
            update = update.to(device)
            packet, _ = compressor.encode(update, compressor.init(layout, device))
            assert (packet.numel, packet.nbytes) == (layout.numel, packet.data.numel())
            assert (packet.data.dtype, packet.data.dim(), packet.data.device) == (torch.uint8, 1, update.device)
            decoded = compressor.decode(packet)
            assert (decoded.dtype, decoded.shape, decoded.device) == (torch.float32, update.shape, update.device)
            assert bool(decoded.isfinite().all())

        law()

    @pytest.mark.parametrize(
        "shapes", [(), ((0,),), ((1,),), ((1, 1),), ((3, 0, 2), (2,)), ((2, 2),), ((0, 3), (40, 40))]
    )
    def test_layouts_at_the_edge(
        self, compressor: Compressor, device: str, shapes: tuple[tuple[int, ...], ...]
    ) -> None:
        layout = Layout(shapes)
        state = compressor.init(layout, device)
        for _ in range(3):
            packet, state = compressor.encode(torch.full((layout.numel,), 0.5, device=device), state)
            decoded = compressor.decode(received(packet))
            assert decoded.shape == (layout.numel,)
            assert bool(decoded.isfinite().all())

    @pytest.mark.parametrize("name", [name for name, _ in EDGES])
    def test_values_at_the_edge(self, compressor: Compressor, layout: Layout, device: str, name: str) -> None:
        update = dict(EDGES)[name](layout.numel).to(device)
        state = compressor.init(layout, device)
        for _ in range(4):
            packet, state = compressor.encode(update, state)
            decoded = compressor.decode(packet)
            assert bool(decoded.isfinite().all())
            if not update.any():
                assert not decoded.any(), "out of nothing comes something"

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_crashes_nothing(
        self, compressor: Compressor, layout: Layout, device: str, bad: float
    ) -> None:
        """What comes of it is the caller's affair, but he gets a packet that decodes, or a refusal."""
        for update in (torch.full((layout.numel,), bad), torch.ones(layout.numel).index_fill_(0, torch.tensor(7), bad)):
            try:
                packet, _ = compressor.encode(update.to(device), compressor.init(layout, device))
                assert compressor.decode(packet).shape == update.shape
            except ThinwireError:
                pass

    def test_an_update_is_flat_float32(self, compressor: Compressor, layout: Layout, device: str) -> None:
        state = compressor.init(layout, device)
        flat = torch.ones(layout.numel, device=device)
        for wrong in (flat.double(), flat.half(), flat.int(), flat.unsqueeze(0)):
            with pytest.raises(MisuseError):
                compressor.encode(wrong, state)

    # --- purity ------------------------------------------------------------------------------------------------------

    def test_encode_is_pure(self, compressor: Compressor, layout: Layout, device: str) -> None:
        @quick
        @given(st.lists(updates(layout.numel), min_size=1, max_size=3))
        def law(sequence: list[Tensor]) -> None:
            state = compressor.init(layout, device)
            for update in (update.to(device) for update in sequence):
                update_before, state_before = update.clone(), copy.deepcopy(state)
                first = compressor.encode(update, state)
                second = compressor.encode(update, state)
                assert same(update, update_before), "encode changed its update"
                assert same(state, state_before), "encode changed the state it was given"
                assert same(first, second), "the same input gave another packet or state"
                update.fill_(-77.0)  # DDP writes the next gradients into the same bucket
                assert same(first, compressor.encode(update_before, state_before)), "the packet or state is a view"
                state = first[1]

        law()

    def test_decode_depends_on_the_bytes_alone(self, compressor: Compressor, layout: Layout, device: str) -> None:
        other = copy.deepcopy(compressor)
        state = compressor.init(layout, device)
        for step in range(4):
            update = torch.randn(layout.numel, generator=torch.Generator().manual_seed(step)).to(device)
            packet, state = compressor.encode(update, state)
            bytes_before = packet.data.clone()
            decoded = compressor.decode(packet)
            assert same(other.decode(received(packet)), decoded)
            assert same(packet.data, bytes_before), "decode changed the packet"
            decoded.zero_()
            assert same(packet.data, bytes_before), "what was decoded is a view of the packet"

    def test_equal_ones_have_equal_reprs(self, compressor: Compressor) -> None:
        assert repr(copy.deepcopy(compressor)) == repr(compressor)
        assert copy.deepcopy(compressor) == compressor
        assert " at 0x" not in repr(compressor), "ranks compare reprs"

    # --- state -------------------------------------------------------------------------------------------------------

    def test_a_saved_state_continues_alike(self, compressor: Compressor, layout: Layout, device: str) -> None:
        @quick
        @given(st.lists(updates(layout.numel), min_size=2, max_size=5), st.integers(0, 4))
        def law(sequence: list[Tensor], cut: int) -> None:
            state = resumed = compressor.init(layout, device)
            for step, update in enumerate(sequence):
                if step == cut:
                    resumed = _saved_and_loaded(state)
                    assert same(resumed, state)
                packet, state = compressor.encode(update.to(device), state)
                again, resumed = compressor.encode(update.to(device), resumed)
                assert same(again, packet)
            assert same(resumed, state)

        law()

    def test_another_density_goes_on_with_the_same_state(
        self, compressor: Compressor, layout: Layout, device: str
    ) -> None:
        sizes = []
        state = compressor.init(layout, device)
        update = torch.linspace(-1, 1, layout.numel, device=device)
        for density in (0.01, 0.1, 0.6):
            changed = compressor.at(density)
            assert type(changed) is type(compressor)
            packet, state = changed.encode(update, state)
            assert changed.decode(packet).shape == update.shape
            sizes.append(packet.nbytes)
        if compressor.at(0.01) == compressor.at(0.6):
            assert compressor.at(0.5) == compressor, "one without a density is returned as it is"
            assert len(set(sizes)) == 1
        else:
            assert sizes[0] < sizes[1] < sizes[2]

    # --- promises ----------------------------------------------------------------------------------------------------

    def test_it_is_a_contraction(self, compressor: Compressor, claims: Claims, layout: Layout, device: str) -> None:
        if claims.contraction is None:
            pytest.skip("no contraction is claimed")
        kept = 1 - claims.contraction

        @settings(quick, max_examples=25)
        @given(updates(layout.numel))
        def law(update: Tensor) -> None:
            packet, _ = compressor.encode(update.to(device), compressor.init(layout, device))
            lost = squared_norm(compressor.decode(packet).cpu() - update)
            assert lost <= kept * squared_norm(update) * (1 + 1e-5) + 1e-80

        law()

    def test_its_expected_value_is_the_update(
        self, compressor: Compressor, claims: Claims, layout: Layout, device: str
    ) -> None:
        if not claims.unbiased:
            pytest.skip("it is not claimed to be unbiased")
        update = torch.randn(layout.numel, generator=torch.Generator().manual_seed(1)).to(device)
        state, draws = compressor.init(layout, device), []
        for _ in range(1000):
            packet, state = compressor.encode(update, state)
            draws.append(compressor.decode(packet).cpu())
        assert len({tuple(draw.tolist()) for draw in draws[:20]}) == 20, "each step draws anew"
        assert_close_on_average(draws, update.cpu())

    def test_it_is_exact(self, compressor: Compressor, claims: Claims, layout: Layout, device: str) -> None:
        if not claims.exact:
            pytest.skip("it is not claimed to be exact")

        @quick
        @given(updates(layout.numel))
        def law(update: Tensor) -> None:
            packet, _ = compressor.encode(update.to(device), compressor.init(layout, device))
            assert torch.equal(compressor.decode(packet).cpu(), update)

        law()

    # --- hostile bytes -----------------------------------------------------------------------------------------------

    def test_cut_or_extended_packets_are_refused(self, compressor: Compressor, layout: Layout, device: str) -> None:
        update = torch.linspace(-1, 2, layout.numel, device=device)
        packet, _ = compressor.encode(update, compressor.init(layout, device))
        size = packet.nbytes
        for nbytes in sorted({0, 1, 3, 4, 5, 8, size // 2, size - 8, size - 1} - {size}):
            if 0 <= nbytes < size:
                with pytest.raises(MalformedError):
                    compressor.decode(Packet(packet.numel, packet.data[:nbytes].clone()))
        for extra in (1, 4, 8, 1000):
            with pytest.raises(MalformedError):
                compressor.decode(Packet(packet.numel, torch.cat([packet.data, packet.data.new_zeros(extra)])))

    def test_damaged_packets_are_refused_or_decode_to_something(
        self, compressor: Compressor, layout: Layout, device: str
    ) -> None:
        update = torch.linspace(-1, 2, layout.numel, device=device)
        packet, _ = compressor.encode(update, compressor.init(layout, device))
        size = packet.nbytes
        flips = st.dictionaries(
            st.integers(0, size - 1) | st.integers(0, min(size - 1, 40)), st.integers(1, 255), min_size=1
        )

        @settings(quick, max_examples=25)
        @given(flips)
        def flipped(changes: dict[int, int]) -> None:
            data = packet.data.cpu().clone()
            for position, mask in changes.items():
                data[position] ^= mask
            _decode_or_refuse(compressor, Packet(packet.numel, data.to(device)))

        @settings(quick, max_examples=25)
        @given(st.binary(min_size=size, max_size=size) | st.binary(max_size=64))
        def garbage(data: bytes) -> None:
            _decode_or_refuse(compressor, Packet(packet.numel, torch.tensor(list(data), dtype=torch.uint8).to(device)))

        flipped()
        garbage()


def _saved_and_loaded(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded


def _decode_or_refuse(compressor: Compressor, packet: Packet) -> None:
    try:
        decoded = compressor.decode(packet)
    except MalformedError:
        return
    assert (decoded.dtype, decoded.shape) == (torch.float32, (packet.numel,))

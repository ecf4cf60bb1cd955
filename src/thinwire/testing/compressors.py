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
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.compress.base import Compressor, Layout, Packet, State
from thinwire.compress.values import ValueCodec
from thinwire.errors import MalformedError, MisuseError, ThinwireError

__all__ = ["Claims", "CompressorContract", "ValueCodecContract", "same", "updates"]

LAYOUT = Layout(((24, 10), (24,), (6, 5, 4), (), (7, 1)))

_quick = settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])


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


def _received(packet: Packet) -> Packet:
    """The packet as it arrives: copied bytes, somewhere inside a message, at an odd address."""
    message = torch.cat([packet.data.new_zeros(3), packet.data, packet.data.new_zeros(2)])
    return Packet(packet.numel, message[3 : 3 + packet.nbytes])


def _squared_norm(values: Tensor) -> float:
    return float(values.double().square().sum())


def _assert_close_on_average(draws: list[Tensor], expected: Tensor) -> None:
    """The mean is within seven standard errors, and what rounding adds, of what is expected."""
    values = torch.stack(draws).double()
    error = (values.mean(0) - expected.double()).abs()
    standard = values.std(0) / len(draws) ** 0.5
    # An outcome of probability p that never came up leaves the spread at zero: it could be as rare as 1 / draws.
    allowed = (
        7 * standard + expected.double().abs() * 1e-5 + float(expected.abs().max()) * 20 / len(draws) * (standard == 0)
    )
    assert bool((error <= allowed).all()), f"off by {float((error / allowed).max()):.2f} times what chance allows"


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
        @_quick
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
            decoded = compressor.decode(_received(packet))
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
        @_quick
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
            assert same(other.decode(_received(packet)), decoded)
            assert same(packet.data, bytes_before), "decode changed the packet"
            decoded.zero_()
            assert same(packet.data, bytes_before), "what was decoded is a view of the packet"

    def test_equal_ones_have_equal_reprs(self, compressor: Compressor) -> None:
        assert repr(copy.deepcopy(compressor)) == repr(compressor)
        assert copy.deepcopy(compressor) == compressor
        assert " at 0x" not in repr(compressor), "ranks compare reprs"

    # --- state -------------------------------------------------------------------------------------------------------

    def test_a_saved_state_continues_alike(self, compressor: Compressor, layout: Layout, device: str) -> None:
        @_quick
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

        @settings(_quick, max_examples=25)
        @given(updates(layout.numel))
        def law(update: Tensor) -> None:
            packet, _ = compressor.encode(update.to(device), compressor.init(layout, device))
            lost = _squared_norm(compressor.decode(packet).cpu() - update)
            assert lost <= kept * _squared_norm(update) * (1 + 1e-5) + 1e-80

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
        _assert_close_on_average(draws, update.cpu())

    def test_it_is_exact(self, compressor: Compressor, claims: Claims, layout: Layout, device: str) -> None:
        if not claims.exact:
            pytest.skip("it is not claimed to be exact")

        @_quick
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

        @settings(_quick, max_examples=25)
        @given(flips)
        def flipped(changes: dict[int, int]) -> None:
            data = packet.data.cpu().clone()
            for position, mask in changes.items():
                data[position] ^= mask
            _decode_or_refuse(compressor, Packet(packet.numel, data.to(device)))

        @settings(_quick, max_examples=25)
        @given(st.binary(min_size=size, max_size=size) | st.binary(max_size=64))
        def garbage(data: bytes) -> None:
            _decode_or_refuse(compressor, Packet(packet.numel, torch.tensor(list(data), dtype=torch.uint8).to(device)))

        flipped()
        garbage()


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
            assert same(codec.decode(_received(Packet(count, data)).data, count), decoded)

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

        @settings(_quick, max_examples=25)
        @given(st.integers(0, 1000).flatmap(updates))
        def law(values: Tensor) -> None:
            decoded = codec.decode(codec.encode(values.to(device), seed=0), values.numel()).cpu()
            assert _squared_norm(decoded - values) <= kept * _squared_norm(values) * (1 + 1e-5) + 1e-80

        law()

    def test_its_expected_value_is_the_input(self, codec: ValueCodec, claims: Claims, device: str) -> None:
        assert codec.unbiased is claims.unbiased
        if not claims.unbiased:
            pytest.skip("it is not claimed to be unbiased")
        values = torch.randn(600, generator=torch.Generator().manual_seed(1)).to(device)
        draws = [codec.decode(codec.encode(values, seed), 600).cpu() for seed in range(1000)]
        _assert_close_on_average(draws, values.cpu())

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
        @settings(_quick, max_examples=25)
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

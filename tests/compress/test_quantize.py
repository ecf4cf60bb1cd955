"""Quantisers: the bytes that the format says, the errors that the papers bound, chance that differs between ranks."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compress import quantize
from thinwire.compress.base import Layout
from thinwire.compress.quantize import QSGD, Float8, Int4, Int8, Quantize, Sign
from thinwire.compress.values import Float32, ValueCodec, value_codec
from thinwire.errors import MalformedError, MisuseError
from thinwire.testing.compressors import same, updates

CODECS = [
    Int8(),
    Int8(block=10),
    Int4(),
    Int4(block=3),
    Float8(block=64),
    QSGD(),
    QSGD(1),
    QSGD(2, block=5),
    Sign(block=9),
]


# --- the readable version ---------------------------------------------------------------------------------------------


def levels_of(codec: Any) -> list[float]:
    """What each symbol stands for, said once more."""
    if isinstance(codec, Float8):
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return [np.float32(value) / np.float32(448) for value in every.float().tolist()]
    if isinstance(codec, Sign):
        return [np.float32(-1), np.float32(1)]
    steps = {Int8: 127, Int4: 7}.get(type(codec)) or codec.levels
    return [np.float32(step) / np.float32(steps) for step in range(-steps, steps + 1)]


def unpack_oracle(data: bytes, count: int, base: int) -> list[int]:
    per_byte = max(digits for digits in range(1, 9) if base**digits <= 256)
    size = -(-count // per_byte)
    assert len(data) == size
    return [data[i % size] // base ** (i // size) % base for i in range(count)]


def decode_oracle(codec: Any, data: bytes, count: int) -> list[float]:
    blocks = -(-count // codec.block)
    scales = [np.float32(scale) for scale in struct.unpack(f"<{blocks}f", data[: 4 * blocks])]
    levels = levels_of(codec)
    symbols = unpack_oracle(data[4 * blocks :], count, len(levels))
    return [float(levels[symbol] * scales[i // codec.block]) for i, symbol in enumerate(symbols)]


def nearest_oracle(codec: Any, values: list[float]) -> tuple[list[float], list[int]]:
    """Scales and symbols of Int8 and Int4."""
    steps = {Int8: 127, Int4: 7}[type(codec)]
    scales, symbols = [], []
    for start in range(0, len(values), codec.block):
        block = [np.float32(value) for value in values[start : start + codec.block]]
        largest = max(abs(value) for value in block)
        scales.append(float(largest))
        for value in block:
            unit = value / largest if largest else np.float32(0)
            symbols.append(round(float(unit * np.float32(steps))) + steps)
    return scales, symbols


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_decoding_is_what_the_format_says(codec: ValueCodec) -> None:
    @settings(max_examples=20)
    @given(st.integers(0, 300).flatmap(updates), st.integers(0, 9))
    def law(values: torch.Tensor, seed: int) -> None:
        data = codec.encode(values, seed)
        expected = decode_oracle(codec, bytes(data.tolist()), values.numel())
        assert same(codec.decode(data, values.numel()), torch.tensor(expected))

    law()


@pytest.mark.parametrize("codec", [Int8(), Int8(block=10), Int4(), Int4(block=3)], ids=repr)
def test_encoding_to_nearest_is_what_the_format_says(codec: Any) -> None:
    @settings(max_examples=20)
    @given(st.integers(1, 300).flatmap(updates))
    def law(values: torch.Tensor) -> None:
        data = bytes(codec.encode(values, seed=0).tolist())
        scales, symbols = nearest_oracle(codec, values.tolist())
        assert data[: 4 * len(scales)] == struct.pack(f"<{len(scales)}f", *scales)
        assert unpack_oracle(data[4 * len(scales) :], len(symbols), len(levels_of(codec))) == symbols

    law()


@pytest.mark.parametrize("codec", [Int8(), Int4(block=300), Float8(block=64), Sign(block=100)], ids=repr)
def test_chunks_do_not_show(codec: ValueCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(5003)
    data = codec.encode(values, seed=0)
    decoded = codec.decode(data, 5003)
    for chunk in (1, 64, 1000):
        monkeypatch.setattr(quantize, "CHUNK", chunk)
        assert same(codec.encode(values, seed=0), data)
        assert same(codec.decode(data, 5003), decoded)


@pytest.mark.parametrize(
    ("codec", "bits"),
    [(Int8(), 8.13), (Float8(), 8.13), (Int4(), 4.13), (QSGD(levels=1), 1.66), (Sign(), 1.13), (QSGD(), 4.06)],
    ids=repr,
)
def test_bits_a_value(codec: ValueCodec, bits: float) -> None:
    assert round(codec.size(10**6) * 8 / 10**6, 2) == pytest.approx(bits, abs=0.006)


# --- errors -----------------------------------------------------------------------------------------------------------


def by_block(values: torch.Tensor, block: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, -values.numel() % block)).view(-1, block).double()


@given(st.integers(1, 1000).flatmap(updates), st.sampled_from([(Int8(), 127), (Int4(), 7), (Int8(block=7), 127)]))
def test_to_nearest_is_off_by_half_a_step(values: torch.Tensor, case: tuple[Any, int]) -> None:
    codec, steps = case
    error = codec.decode(codec.encode(values, seed=0), values.numel()) - values
    largest = by_block(values, codec.block).abs().amax(1, keepdim=True)
    assert bool((by_block(error, codec.block).abs() <= largest / (2 * steps) * (1 + 1e-5) + 1e-45).all())


@given(st.integers(1, 1000).flatmap(updates))
def test_float8_keeps_a_relative_error_far_down(values: torch.Tensor) -> None:
    decoded = Float8().decode(Float8().encode(values, seed=0), values.numel())
    largest = by_block(values, 256).abs().amax(1, keepdim=True)
    magnitude = by_block(values, 256).abs()
    # The smallest normal number of e4m3 is 2**-6, the step below it 2**-9; the largest number is 448.
    allowed = torch.maximum(magnitude / 16, largest / 448 * 2**-10)
    assert bool((by_block(decoded - values, 256).abs() <= allowed * (1 + 1e-5) + 1e-44).all())


@given(st.integers(1, 1000).flatmap(updates))
def test_sign_is_the_mean_magnitude_times_the_sign(values: torch.Tensor) -> None:
    codec = Sign(block=100)
    decoded = codec.decode(codec.encode(values, seed=0), values.numel())
    for start in range(0, values.numel(), 100):
        block, sent = values[start : start + 100], decoded[start : start + 100]
        mean = block.double().abs().mean()
        torch.testing.assert_close(sent.double().abs(), mean.expand(block.numel()), rtol=1e-5, atol=1e-44)
        assert bool((sent * block.sign() >= 0).all())


@given(st.integers(1, 600).flatmap(updates), st.integers(0, 2**64 - 1), st.sampled_from([1, 2, 7, 127]))
def test_qsgd_rounds_to_a_neighbouring_level(values: torch.Tensor, seed: int, levels: int) -> None:
    codec = QSGD(levels)
    decoded = codec.decode(codec.encode(values, seed), values.numel())
    largest = by_block(values, codec.block).abs().amax(1, keepdim=True)
    assert bool((by_block(decoded - values, codec.block).abs() <= largest / levels * (1 + 1e-5)).all())


@pytest.mark.parametrize("levels", [1, 4, 30])
@pytest.mark.parametrize("block", [16, 256])
def test_the_variance_of_qsgd_is_below_its_bound(levels: int, block: int) -> None:
    """Alistarh et al. 2017, lemma 3.1 (iii), for the norm of their theory; the maximum errs no more."""
    generator = torch.Generator().manual_seed(0)
    for values in (
        torch.randn(block, generator=generator),
        torch.ones(block),
        torch.rand(block, generator=generator) ** 8,
    ):
        bound = min(block / levels**2, block**0.5 / levels)
        errors = {}
        for norm in ("l2", "max"):
            codec = QSGD(levels, block, norm)  # type: ignore[arg-type]
            draws = torch.stack([codec.decode(codec.encode(values, seed), block) for seed in range(200)])
            errors[norm] = float((draws - values).square().sum(1).mean() / values.square().sum())
        assert errors["l2"] <= bound * 1.1
        assert errors["max"] <= errors["l2"] * 1.1 + 1e-9


def test_what_is_not_finite_spoils_its_block_and_no_other() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        values = torch.ones(100)
        values[42] = bad
        for codec in (Int8(block=10), Int4(block=10), Float8(block=10), QSGD(block=10), Sign(block=10)):
            decoded = codec.decode(codec.encode(values, seed=0), 100)
            assert bool(decoded[40:50].isnan().all())
            assert torch.equal(torch.cat([decoded[:40], decoded[50:]]), torch.ones(90))


@pytest.mark.parametrize("codec", [Int8(), Int4(), Float8(), QSGD(), Sign()], ids=lambda c: type(c).__name__)
def test_no_values_are_no_bytes_wherever_these_lie(codec: ValueCodec) -> None:
    assert codec.encode(torch.empty(0), 0).numel() == codec.size(0) == 0
    for data in (torch.empty(0, dtype=torch.uint8), torch.from_numpy(np.empty(0, np.uint8))):
        assert codec.decode(data, 0).shape == (0,)


def test_a_byte_that_no_symbols_make_is_refused() -> None:
    for codec, most in ((QSGD(levels=1), 243), (QSGD(levels=7), 225), (QSGD(levels=127), 255)):
        data = codec.encode(torch.ones(50), seed=0)
        for byte in (most, 255):
            data[-1] = byte
            with pytest.raises(MalformedError):
                codec.decode(data, 50)
        data[-1] = most - 1
        assert bool(codec.decode(data, 50).isfinite().all())


# --- chance -----------------------------------------------------------------------------------------------------------


def test_ranks_err_independently_and_one_rank_anew_each_step() -> None:
    update = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    codec = QSGD(levels=2)
    errors = []
    for rank in range(4):
        compressor = Quantize(codec, seed=rank)
        state = compressor.init(Layout(((4000,),)))
        for _ in range(4):
            packet, state = compressor.encode(update, state)
            errors.append(compressor.decode(packet) - update)
    correlations = torch.corrcoef(torch.stack(errors)) - torch.eye(16)
    assert float(correlations.abs().max()) < 0.1  # about six standard deviations


def test_the_seed_of_a_rank_is_no_part_of_what_ranks_agree_on() -> None:
    first, second = Quantize(QSGD(), seed=1), Quantize(QSGD(), seed=2)
    assert (repr(first), first) == (repr(second), second)
    assert repr(Quantize(QSGD(levels=1))) != repr(first)
    state = first.init(Layout(((50,),)))
    assert state["seed"] == 1
    update = torch.randn(50)
    theirs, _ = second.encode(update, second.init(Layout(((50,),))))
    assert same(first.encode(update, {**state, "seed": 2})[0], theirs)
    assert not same(first.encode(update, state)[0], theirs)


# --- misuse -----------------------------------------------------------------------------------------------------------


def test_names_of_a_configuration() -> None:
    assert (value_codec("int8"), value_codec("float8")) == (Int8(), Float8())
    assert replace(Quantize(), codec=Float32()) == Quantize(Float32())


@pytest.mark.parametrize(
    "wrong",
    [lambda: Int8(0), lambda: Int4(-1), lambda: Float8(0), lambda: Sign(0), lambda: QSGD(0), lambda: QSGD(128),
     lambda: QSGD(block=0), lambda: QSGD(norm="l1")],
)  # fmt: skip
def test_impossible_codecs_are_refused(wrong: Any) -> None:
    with pytest.raises(MisuseError):
        wrong()


def test_an_update_of_another_size_is_refused() -> None:
    compressor = Quantize()
    with pytest.raises(MisuseError, match="9 elements"):
        compressor.encode(torch.ones(9), compressor.init(Layout(((10,),))))

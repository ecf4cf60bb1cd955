"""The entropy coder: lossless, equal to the readable decoder, close to the entropy, and closed to damaged input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from thinwire.errors import MalformedError
from thinwire.wire import rans, reference

DTYPES = [np.uint8, np.uint16, np.uint32, np.uint64]


@st.composite
def integer_arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    top = draw(st.integers(0, 8 * dtype.itemsize))
    size = draw(st.sampled_from([0, 1, 2, 7, 100, 2047, 2048, 2055, 5000]))
    kind = draw(st.sampled_from(["uniform", "geometric", "constant", "exact"]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    if kind == "exact" and size <= 100:
        return draw(hnp.arrays(dtype, size, elements=st.integers(0, np.iinfo(dtype).max)))
    if kind == "constant":
        return np.full(size, draw(st.integers(0, np.iinfo(dtype).max)), dtype)
    if kind == "geometric":
        p = draw(st.floats(0.0005, 1.0))
        return np.minimum((rng.geometric(p, size) - 1).astype(np.uint64), np.uint64(np.iinfo(dtype).max)).astype(dtype)
    return rng.integers(0, 2**top - 1, size, dtype=np.uint64, endpoint=True).astype(dtype)


@given(values=integer_arrays(), effort=st.sampled_from([rans.EFFORT_FAST, rans.EFFORT_SMALL]))
def test_decode_inverts_encode_and_equals_the_readable_decoder(values: np.ndarray, effort: int) -> None:
    data = rans.encode(values, effort)
    assert len(data) <= rans.encoded_size_max(values.size, values.itemsize)
    assert (rans.decode(data, values.size, values.dtype) == values).all()
    assert reference.decode_stream(data, values.size) == values.tolist()


@pytest.mark.parametrize("size", [rans.CHUNK - 1, rans.CHUNK, rans.CHUNK + 1, 3 * rans.CHUNK + 17])
@pytest.mark.parametrize("effort", [rans.EFFORT_FAST, rans.EFFORT_SMALL])
def test_chunk_edges(size: int, effort: int) -> None:
    values = np.random.default_rng(size).geometric(0.01, size).astype(np.uint32)
    assert (rans.decode(rans.encode(values, effort), size, np.uint32) == values).all()


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.5, 0.95])
def test_geometric_gaps_cost_at_most_one_percent_over_their_entropy(p: float) -> None:
    values = (np.random.default_rng(1).geometric(p, 200_000) - 1).astype(np.uint32)
    entropy = (-p * np.log2(p) - (1 - p) * np.log2(1 - p)) / p
    bits = 8 * len(rans.encode(values)) / values.size
    assert bits <= 1.01 * entropy + 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bits_grow_by_less_than_two_percent(dtype: type) -> None:
    values = np.random.default_rng(2).integers(0, np.iinfo(dtype).max, 100_000, dtype=dtype, endpoint=True)
    assert len(rans.encode(values)) <= 1.02 * values.nbytes


@given(
    values=hnp.arrays(np.uint32, st.integers(1, 300), elements=st.integers(0, 5000)),
    where=st.integers(0, 10**9),
    flip=st.integers(1, 255),
)
def test_a_flipped_byte_is_refused_or_changes_values_but_never_harms(values: np.ndarray, where: int, flip: int) -> None:
    data = bytearray(rans.encode(values))
    data[where % len(data)] ^= flip
    try:
        decoded = rans.decode(bytes(data), values.size, np.uint32)
    except MalformedError:
        return
    assert decoded.size == values.size


@given(values=hnp.arrays(np.uint16, st.integers(1, 300), elements=st.integers(0, 900)), cut=st.integers(1, 10**9))
def test_truncated_and_extended_streams_are_refused(values: np.ndarray, cut: int) -> None:
    data = rans.encode(values)
    with pytest.raises(MalformedError):
        rans.decode(data[: len(data) - 1 - cut % len(data)], values.size, np.uint16)
    with pytest.raises(MalformedError):
        rans.decode(data + b"\0", values.size, np.uint16)


@given(data=st.binary(max_size=400), count=st.integers(0, 5000), dtype=st.sampled_from(DTYPES))
def test_noise_is_refused_or_decodes_in_bounds(data: bytes, count: int, dtype: type) -> None:
    try:
        assert rans.decode(data, count, dtype).size == count
    except MalformedError:
        pass


def test_integers_wider_than_the_target_are_refused() -> None:
    data = rans.encode(np.array([300, 5], np.uint16))
    with pytest.raises(MalformedError):
        rans.decode(data, 2, np.uint8)

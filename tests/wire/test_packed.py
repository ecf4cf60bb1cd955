"""Integers in whole bytes: lossless, never larger than plain, and nothing but what the encoder writes is read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MalformedError
from thinwire.wire import packed

TYPES = ["u1", "u2", "u4", "u8"]


@st.composite
def integers(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(TYPES)))
    small = draw(st.integers(1, 8 * dtype.itemsize))
    values = draw(st.lists(st.integers(0, 2**small - 1), max_size=300))
    for index in draw(st.lists(st.integers(0, max(0, len(values) - 1)), max_size=4)) if values else []:
        values[index] = draw(st.integers(0, 2 ** (8 * dtype.itemsize) - 1))
    return np.array(values, dtype)


@given(values=integers())
def test_packing_is_lossless_and_bounded(values: np.ndarray) -> None:
    data = packed.encode(values)
    assert len(data) <= packed.encoded_size_max(values.size, values.itemsize)
    found = packed.decode(memoryview(data), values.size, values.dtype)
    assert found.dtype == values.dtype
    assert (found == values).all()
    assert found.flags.writeable


@pytest.mark.parametrize(("largest", "width"), [(255, 1), (256, 2), (65535, 2), (65536, 4)])
def test_the_width_is_that_of_most(largest: int, width: int) -> None:
    values = np.full(1000, largest, np.uint32)
    assert packed.encode(values)[0] == width
    values[500] = 2**32 - 1
    data = packed.encode(values)
    assert data[0] == width
    assert len(data) <= 1000 * width + 11


@given(values=integers(), where=st.integers(0, 10**6), flip=st.integers(1, 255), cut=st.integers(0, 9))
def test_damage_is_refused_or_read_as_other_integers(values: np.ndarray, where: int, flip: int, cut: int) -> None:
    data = bytearray(packed.encode(values))
    data[where % len(data)] ^= flip
    try:
        found = packed.decode(memoryview(bytes(data[: len(data) - cut])), values.size, values.dtype)
    except MalformedError:
        return
    assert found.shape == values.shape
    assert found.dtype == values.dtype


@pytest.mark.parametrize(
    "data",
    [
        b"",  # no width
        b"\x03\x00" + bytes(9),  # no such width
        b"\x08\x00" + bytes(24),  # wider than the integers
        b"\x01\x04" + bytes(40),  # more exceptions than integers
        b"\x01\x00" + bytes(2),  # too few bytes
        b"\x01\x00" + bytes(4),  # too many
        b"\x01\x02" + bytes(3) + b"\x01\x00\x00\x00" * 2 + b"\x00\x01\x00\x00" * 2,  # twice the same index
        b"\x01\x01" + bytes(3) + b"\x03\x00\x00\x00" + b"\x00\x01\x00\x00",  # an index behind the end
        b"\x01\x01" + bytes(3) + b"\x01\x00\x00\x00" + b"\x09\x00\x00\x00",  # an exception that is none
        b"\x01\x01" + bytes(3) + b"\x01\x00\x00\x00" + b"\x01\x01\x00\x00",  # its low byte is another
        b"\x04\x01" + bytes(12) + bytes(8),  # exceptions of the full width
    ],
)
def test_what_the_encoder_never_writes_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        packed.decode(memoryview(data), 3, np.uint32)

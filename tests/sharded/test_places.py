"""Positions of a chunk in its tensor, against an oracle that counts the tensor's cells."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MalformedError
from thinwire.sync.places import places_in
from thinwire.wire.chunks import Box
from thinwire.wire.spec import dtype_of

WIDTHS = {"BF16": 1, "U8": 1, "C64": 2}


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Box, tuple[int, ...]]:
    """A box of a tensor of none to five dimensions; it may be empty, a single element, or the whole."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=5)))
    spans = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans)), shape


@given(boxes(), st.sampled_from(sorted(WIDTHS)), st.randoms(use_true_random=False))
def test_every_position_is_where_counting_finds_it(
    found: tuple[Box, tuple[int, ...]], dtype: str, order: random.Random
) -> None:
    box, shape = found
    width = WIDTHS[dtype]
    counted = np.arange(int(np.prod(shape, dtype=np.int64)) * width).reshape(*shape, width)
    oracle = counted[box.slices()].reshape(-1)
    positions = np.array([k for k in range(oracle.size) if order.random() < 0.7], np.int64)
    placed = places_in(box, shape, dtype_of(dtype), positions)
    assert placed.dtype == np.int64
    assert placed.tolist() == oracle[positions].tolist()


def test_positions_are_not_changed_and_far_ones_do_not_overflow() -> None:
    positions = np.array([0, 3], np.uint32)
    box = Box((1 << 23, 0), (2, 2))
    placed = places_in(box, (1 << 24, 1 << 20), dtype_of("BF16"), positions)
    assert placed.tolist() == [1 << 43, (1 << 43) + (1 << 20) + 1]
    whole = np.array([1, 2])
    assert places_in(Box((0,), (4,)), (4,), dtype_of("U8"), whole) is not whole
    assert positions.tolist() == [0, 3]


def test_packed_types_can_only_be_whole() -> None:
    positions = np.array([0, 1])
    assert places_in(Box((0, 0), (2, 4)), (2, 4), dtype_of("F4"), positions).tolist() == [0, 1]
    with pytest.raises(MalformedError, match="cannot be cut"):
        places_in(Box((0, 0), (1, 4)), (2, 4), dtype_of("F4"), positions)

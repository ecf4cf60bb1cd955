"""Segments: gaps, context and raw; every data type; the readable decoder as the oracle; damaged input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MalformedError, RefuseError, UnsupportedError
from thinwire.tensors import kernels
from thinwire.wire import context, positions, reference, segment, values
from thinwire.wire.spec import DTYPES, DType

FLOATS = [d for d in DTYPES.values() if d.is_float]


def random_pair(dtype: DType, size: int, density: float, seed: int, *, wild: bool) -> tuple[np.ndarray, np.ndarray]:
    """Old and new cells: small steps of weights like a model's, or arbitrary bit patterns."""
    rng = np.random.default_rng(seed)
    if wild or dtype.name not in ("F32", "F16", "F64"):
        old = rng.integers(0, 2 ** (8 * dtype.cell_bytes), size, dtype=np.uint64).astype(dtype.cells)
        if dtype.name == "BF16" and not wild:
            old = (rng.standard_normal(size).astype(np.float32) * 0.02).view(np.uint32) >> 16
            old = old.astype(np.uint16)
    else:
        old = (rng.standard_normal(size) * 0.02).astype(f"f{dtype.cell_bytes}").view(dtype.cells)
    new = old.copy()
    where = rng.random(size) < density
    steps = rng.integers(1, 4, size).astype(dtype.cells)
    if wild:
        steps = rng.integers(0, 2 ** (8 * dtype.cell_bytes), size, dtype=np.uint64).astype(dtype.cells)
    new[where] += steps[where]
    return old, new


def changes_of(old: np.ndarray, new: np.ndarray, dtype: DType, mode: str) -> segment.Changes:
    where, codes = np.empty(old.size, np.uint32), np.empty(old.size, dtype.cells)
    n = kernels.find_changed(old, new, 0, where, codes, 0, is_float=dtype.is_float, values=mode)
    return segment.Changes(where[:n].copy(), codes[:n].copy())


def expect_new(found: segment.Changes, old: np.ndarray, dtype: DType, mode: str) -> np.ndarray:
    result = old.copy()
    new = found.codes
    if mode == "ulp":
        new = values.apply_steps(old[found.positions], found.codes, is_float=dtype.is_float)
    result[found.positions] = new
    return result


SEGMENTS = {
    "dtype": st.sampled_from(sorted(DTYPES)),
    "size": st.sampled_from([1, 63, 64, 65, 1000, 3000]),
    "density": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    "seed": st.integers(0, 2**32 - 1),
    "wild": st.booleans(),
    "mode": st.sampled_from(["ulp", "absolute"]),
}


@given(**SEGMENTS, packed=st.booleans())
def test_gaps_are_lossless_and_equal_the_readable_decoder(
    dtype: str, size: int, density: float, seed: int, wild: bool, mode: str, packed: bool
) -> None:
    kind = DTYPES[dtype]
    old, new = random_pair(kind, size, density, seed, wild=wild)
    changes = changes_of(old, new, kind, mode)
    if packed:
        data = segment.encode_packed(changes, kind, values=mode)
    else:
        data = segment.encode_gaps(changes, kind, values=mode, effort=1)
    n = changes.positions.size
    found = segment.decode_segment(memoryview(data), kind, cells=size, changed=n, values=mode, base=[])
    assert isinstance(found, segment.Changes)
    assert (expect_new(found, old, kind, mode) == new).all()
    slow = reference.decode_segment(data, n, [], 8 * kind.cell_bytes, 0)
    result = old.tolist()
    for position, code in zip(slow.positions, slow.codes, strict=True):
        result[position] = reference.apply_code(
            result[position], code, 8 * kind.cell_bytes, is_float=kind.is_float, values=mode
        )
    assert result == new.tolist()


def encode_in_context(
    old: np.ndarray, new: np.ndarray, kind: DType, bounds: tuple[int, ...], mode: str, cuts: list[int]
) -> tuple[bytes, int]:
    changes = changes_of(old, new, kind, mode)
    n = changes.positions.size
    classes, gaps = np.empty(n, np.uint8), np.empty(n, np.uint32)
    writer = context.ContextWriter(kind, bounds)
    first = 0
    for start, stop in zip([0, *cuts], [*cuts, old.size], strict=True):
        last = int(np.searchsorted(changes.positions, stop))
        writer.add(old[start:stop], start, changes.positions, first, last, classes, gaps)
        first = last
    data = segment.encode_context(changes.codes, classes, gaps, bounds, kind, values=mode, effort=1)
    return data, n


@given(
    dtype=st.sampled_from([d.name for d in FLOATS]),
    size=SEGMENTS["size"],
    density=SEGMENTS["density"],
    seed=SEGMENTS["seed"],
    wild=SEGMENTS["wild"],
    mode=SEGMENTS["mode"],
    data=st.data(),
)
def test_context_is_lossless_however_the_base_is_cut(
    dtype: str, size: int, density: float, seed: int, wild: bool, mode: str, data: st.DataObject
) -> None:
    kind = DTYPES[dtype]
    old, new = random_pair(kind, size, density, seed, wild=wild)
    top = (1 << kind.exponent_bits) - 2
    bounds = tuple(sorted(data.draw(st.sets(st.integers(0, top), min_size=1, max_size=5))))
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=3)))
    encoded, n = encode_in_context(old, new, kind, bounds, mode, cuts)
    other = sorted(data.draw(st.sets(st.integers(0, size), max_size=3)))
    pieces = [old[a:b] for a, b in zip([0, *other], [*other, size], strict=True)]
    found = segment.decode_segment(memoryview(encoded), kind, cells=size, changed=n, values=mode, base=pieces)
    assert isinstance(found, segment.Changes)
    assert (expect_new(found, old, kind, mode) == new).all()
    slow = reference.decode_segment(encoded, n, old.tolist(), 8 * kind.cell_bytes, kind.mantissa_bits)
    assert slow.positions == found.positions.tolist()


def test_context_is_smaller_where_small_weights_move_most() -> None:
    rng = np.random.default_rng(3)
    masters = rng.standard_normal(400_000).astype(np.float32) * 0.02
    moved = masters + 1e-6 * rng.choice([-1, 1], masters.size).astype(np.float32)
    kind = DTYPES["F32"]
    old, new = masters.view(np.uint32) & 0xFFFF0000, moved.view(np.uint32) & 0xFFFF0000
    histogram = context.Histogram(kind)
    histogram.add(old, new, stride=1)
    bounds = context.choose_bounds(histogram)
    assert bounds
    inside, n = encode_in_context(old, new, kind, bounds, "ulp", [])
    plain = segment.encode_gaps(changes_of(old, new, kind, "ulp"), kind, values="ulp", effort=1)
    assert n > 1000
    assert len(inside) < 0.9 * len(plain)


def test_no_context_where_exponents_say_nothing() -> None:
    rng = np.random.default_rng(4)
    old = (rng.standard_normal(200_000).astype(np.float32) * 0.02).view(np.uint32)
    new = old.copy()
    new[rng.random(old.size) < 0.01] += 1
    histogram = context.Histogram(DTYPES["F32"])
    histogram.add(old, new, stride=1)
    assert context.choose_bounds(histogram) == ()


def test_a_raw_segment_holds_all_cells() -> None:
    cells = np.arange(100, dtype=np.uint16)
    data = segment.encode_raw([cells[:30], cells[30:]])
    found = segment.decode_segment(memoryview(data), DTYPES["BF16"], cells=100, changed=100, values="ulp", base=[cells])
    assert isinstance(found, np.ndarray)
    assert (found == cells).all()


def test_gaps_that_leave_the_segment_are_refused() -> None:
    for bad in ([10], [3, 6], [0xFFFFFFFF], [0, 0xFFFFFFFF]):
        with pytest.raises(MalformedError):
            positions.positions_of(np.array(bad, np.uint32), 0, 10)


def test_a_cold_change_on_a_hot_cell_is_refused() -> None:
    kind = DTYPES["BF16"]
    base = np.zeros(10, np.uint16)  # exponent 0: hot
    out = bytearray([2, 1, 100, 0, 1])  # context, one class up to exponent 100, no hot change, one cold
    for values_ in ([], [], [4], [2]):
        segment._put_stream(out, np.array(values_, np.uint32 if values_ != [2] else np.uint16), 1)
    with pytest.raises(MalformedError):
        segment.decode_segment(memoryview(bytes(out)), kind, cells=10, changed=1, values="ulp", base=[base])


@given(
    seed=st.integers(0, 2**32 - 1),
    codec=st.sampled_from(["gaps", "packed", "context"]),
    where=st.integers(0, 10**9),
    flip=st.integers(0, 255),
    cut=st.integers(0, 50),
)
def test_damaged_segments_are_refused_or_stay_inside(seed: int, codec: str, where: int, flip: int, cut: int) -> None:
    kind = DTYPES["BF16"]
    old, new = random_pair(kind, 2000, 0.1, seed, wild=False)
    if codec != "context":
        changes = changes_of(old, new, kind, "ulp")
        data, n = segment.encode_packed(changes, kind, values="ulp"), changes.positions.size
        if codec == "gaps":
            data = segment.encode_gaps(changes, kind, values="ulp", effort=1)
    else:
        data, n = encode_in_context(old, new, kind, (60, 118), "ulp", [])
    broken = bytearray(data[: len(data) - cut])
    broken[where % len(broken)] ^= flip
    try:
        found = segment.decode_segment(
            memoryview(bytes(broken)), kind, cells=old.size, changed=n, values="ulp", base=[old]
        )
    except RefuseError:
        return
    if isinstance(found, segment.Changes):
        assert found.positions.size == n
        assert (np.diff(found.positions.astype(np.int64)) > 0).all()
        assert found.positions.max(initial=0) < old.size


def test_an_unknown_codec_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="upgrade"):
        segment.decode_segment(memoryview(b"\x63"), DTYPES["BF16"], cells=1, changed=1, values="ulp", base=[])

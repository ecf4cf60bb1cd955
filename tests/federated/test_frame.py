"""Frames: what is decoded is what was meant, and any bytes are read or refused."""

from __future__ import annotations

import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.federated.strategies import moved, states
from thinwire.errors import MalformedError, MisuseError, ThinwireError, UnsupportedError
from thinwire.federated import frame as frames
from thinwire.federated.client import Orders, pack, unpack
from thinwire.federated.model import ModelLayout, ModelState
from thinwire.tensors.select import top_k
from thinwire.wire.digests import hasher


def layout_of(numel: int) -> ModelLayout:
    return ModelLayout((("w", "F32", (numel,)),))


@settings(deadline=None, max_examples=25)
@given(states(), st.integers(0, 99))
def test_anchors_and_cells_are_exact(state, seed):
    old = ModelState.of(state)
    new = moved(old, seed)
    assert frames.decode_anchor(frames.parse_frame(frames.encode_anchor(new, 3))).digest == new.digest
    frame = frames.parse_frame(frames.encode_cells(new, frames.changed_cells(new, old), base=old.digest))
    assert frame.result == frames.decode_cells(frame, old).digest == new.digest
    assert frames.decode_cells(frame, new).digest == new.digest  # and twice does no harm
    every = np.arange(sum(new.layout.cells), dtype=np.uint32)
    assert frames.decode_cells(frames.parse_frame(frames.encode_cells(new, every)), old).digest == new.digest


def test_cells_are_bits_not_values():
    old = ModelState.of({"w": torch.tensor([0.0, float("nan"), 1.0])})
    new = ModelState.of({"w": torch.tensor([-0.0, float("nan"), 1.0])})
    assert frames.changed_cells(new, old).tolist() == [0]
    frame = frames.parse_frame(frames.encode_cells(new, frames.changed_cells(new, old)))
    assert frames.decode_cells(frame, old).digest == new.digest != old.digest


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 400),
    st.floats(0, 1),
    st.sampled_from(frames.VALUES),
    st.sampled_from([1e-30, 1e-7, 1.0, 1e4]),
    st.integers(0, 2**31),
)
def test_a_sparse_frame_holds_its_positions_and_rounded_values(numel, density, name, scale, seed):
    update = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale
    positions = top_k(update, round(density * numel)).indices
    values = update[positions.long()]
    data = frames.encode_sparse(positions, values, numel, name=name, sequence=9)
    sparse = frames.decode_sparse(frames.parse_frame(data), layout_of(numel))
    assert torch.equal(sparse.positions, positions)
    assert torch.equal(sparse.values, frames.rounded(values, name))
    if name == "float32":
        assert torch.equal(sparse.values, values)
    elif scale >= 1e-7 and positions.numel():
        share = {"float16": 2**-10, "bfloat16": 2**-7, "int8": 1 / 200, "float8": 1 / 8, "sign": 1.001}[name]
        assert float((sparse.values - values).abs().max()) <= share * float(values.abs().max())


def test_whole_tensors_travel_as_they_are():
    base = ModelState.of({"n": torch.tensor(3), "w": torch.zeros(2), "e": torch.empty(0, dtype=torch.int64)})
    new = ModelState.of({"n": torch.tensor(3.5).double(), "w": torch.ones(2), "e": torch.empty(0, dtype=torch.int64)})
    whole = new.whole_since(base)
    assert list(whole) == [0]
    data = frames.encode_sparse(torch.tensor([0], dtype=torch.int32), torch.ones(1), 2, whole=whole)
    sparse = frames.decode_sparse(frames.parse_frame(data), base.layout)
    after = sparse.applied_to(base)
    assert after.layout.rows[0] == ("n", "F64", ())
    assert after.tensors[0].item() == 3.5
    assert after.tensors[1].tolist() == [1.0, 0.0]


def resealed(data: bytes) -> bytes:
    """With a check that agrees: what an attacker sends, rather than a bad line."""
    return data[:-8] + hasher("blake3")(data[:-8]).digest()[:8]


def some_frames() -> list[tuple[bytes, ModelState]]:
    base = ModelState.of({"w": torch.randn(50, generator=torch.Generator().manual_seed(1)), "n": torch.tensor(4)})
    new = moved(base, 1)
    positions = torch.arange(0, 50, 3, dtype=torch.int32)
    values = new.minus(base)[positions.long()]
    made = [frames.encode_anchor(new, 1), frames.encode_cells(new, frames.changed_cells(new, base))]
    made += [
        frames.encode_sparse(positions, values, 50, name=name, whole=new.whole_since(base)) for name in frames.VALUES
    ]
    return [(data, base) for data in made]


def read(data: bytes, base: ModelState) -> None:
    frame = frames.parse_frame(data)
    if frame.kind == frames.ANCHOR:
        frames.decode_anchor(frame)
    elif frame.kind == frames.CELLS:
        frames.decode_cells(frame, base)
    else:
        frames.decode_sparse(frame, base.layout).applied_to(base)


@pytest.mark.parametrize("case", range(7))
def test_every_flipped_byte_is_noticed(case):
    data, base = some_frames()[case]
    read(data, base)
    for at in range(len(data)):
        spoilt = bytearray(data)
        spoilt[at] ^= 0x41
        with pytest.raises(ThinwireError):
            read(bytes(spoilt), base)
    for length in range(len(data)):
        with pytest.raises(ThinwireError):
            read(data[:length], base)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 6), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), st.integers(0, 40)
)
def test_resealed_nonsense_is_read_or_refused_and_never_takes_much_memory(case, flips, cut):
    data, base = some_frames()[case]
    spoilt = bytearray(data[: len(data) - 8 - cut])
    for at, value in flips:
        if spoilt:
            spoilt[at % len(spoilt)] = value
    spoilt += bytes(8)
    try:
        read(resealed(bytes(spoilt)), base)
    except ThinwireError:
        pass


def test_a_frame_cannot_make_the_reader_allocate_more_than_the_base_and_the_bytes():
    base = ModelState.of({"w": torch.zeros(1000)})
    body = bytearray()
    frames.put_varint(body, 1000)
    frames.put_varint(body, 1 << 39)  # that many entries
    with pytest.raises(MalformedError):
        read(frames._sealed(frames.SPARSE, 1, frames.NOWHERE, frames.NOWHERE, body), base)
    layout = b'[["w","F32",[281474976710656]]]'
    body = bytearray()
    frames.put_varint(body, len(layout))
    data = frames._sealed(frames.ANCHOR, 1, frames.NOWHERE, frames.NOWHERE, bytes(body) + layout + bytes(16))
    tracemalloc.start()
    with pytest.raises(ThinwireError):
        read(data, base)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_nan_on_the_wire_is_refused():
    for name in ("float32", "float16", "bfloat16", "int8"):
        values = torch.tensor([1.0, float("nan")])
        try:
            data = frames.encode_sparse(torch.tensor([0, 1], dtype=torch.int32), values, 2, name=name)
        except (ValueError, OverflowError):
            continue
        with pytest.raises(MalformedError, match="finite"):
            frames.decode_sparse(frames.parse_frame(data), layout_of(2))
    whole = {0: torch.tensor(float("inf")).double()}
    empty = torch.empty(0, dtype=torch.int32)
    data = frames.encode_sparse(empty, torch.empty(0), 2, whole=whole)
    with pytest.raises(MalformedError, match="finite"):
        frames.decode_sparse(frames.parse_frame(data), ModelLayout((("s", "I64", ()), ("w", "F32", (2,)))))


def test_other_versions_and_kinds_ask_for_an_upgrade():
    data, _ = some_frames()[0]
    for at in (2, 3):
        spoilt = bytearray(data)
        spoilt[at] = 9
        with pytest.raises(UnsupportedError):
            frames.parse_frame(resealed(bytes(spoilt)))


@given(st.binary(max_size=60))
def test_orders_and_payloads_are_read_or_refused(data):
    for reader in (Orders.parse, unpack, frames.parse_frame):
        try:
            reader(data)
        except ThinwireError:
            pass


def test_orders_come_back():
    orders = Orders(0.25, "int8", "ef21", "energy", 77)
    assert Orders.parse(orders.encode()) == orders
    for wrong in ({"values": "float4"}, {"feedback": "yes"}, {"layers": "?"}, {"density": 0.0}, {"density": math.nan}):
        with pytest.raises(MisuseError):
            Orders(**wrong)
    with pytest.raises(ThinwireError):
        Orders.parse(struct.pack("<BBBBfI", 1, 0, 0, 0, float("nan"), 0))
    assert unpack(pack([])) == []


@pytest.mark.parametrize("seed", range(2))
def test_one_percent_in_float16_is_within_its_budget_on_the_wire(seed):
    numel, density = 1_000_000, 0.01
    update = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 1e-3
    positions = top_k(update, int(numel * density)).indices
    data = frames.encode_sparse(positions, update[positions.long()], numel, name="float16")
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8
    assert len(data) / numel <= 0.033
    assert len(data) / numel <= 1.1 * (entropy + 2 * density)

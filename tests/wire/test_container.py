"""Hostile containers: each attack refused with a clear error, before anything is allocated for it."""

from __future__ import annotations

import json
import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from thinwire.errors import MalformedError, RefuseError, ThinwireError, UnsupportedError
from thinwire.sync.encode import Options, make_patch, take_snapshot
from thinwire.sync.layout import StateSource
from thinwire.tensors.tree import state_of
from thinwire.wire import canonical
from thinwire.wire.container import header_length, parse_header
from thinwire.wire.patch import Patch


def make(level: str = "small", values: str = "ulp") -> bytes:
    torch.manual_seed(0)
    old = {"w": torch.randn(300).bfloat16(), "b": torch.randn(7), "gone": torch.zeros(3)}
    new = {"w": old["w"].clone(), "b": old["b"] + 1, "new": torch.arange(5)}
    new["w"][::10] *= 1.01
    snapshot = take_snapshot(StateSource(state_of(old)))
    return b"".join(make_patch(snapshot, StateSource(state_of(new)), Options(level, values, 1)).encode())


def container(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read(data: bytes) -> None:
    parse_header(data[8 : 8 + header_length(data[:8], len(data))], len(data))


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ATTACKS = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header longer than the file": struct.pack("<Q", 1 << 20) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "header that is no JSON": container(b"nonsense"),
    "header that is a list": container([1, 2]),
    "NaN as a number": container(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
    "one name twice": container(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        b"1234",
    ),
    "nested 100,000 deep": container(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "negative offset": container({"a": entry(offsets=(-4, 0))}, b"1234"),
    "offsets backwards": container({"a": entry(offsets=(4, 0))}, b"1234"),
    "offset beyond the file": container({"a": entry(offsets=(0, 8), shape=(8,))}, b"1234"),
    "shape larger than the bytes": container({"a": entry(shape=(5,))}, b"1234"),
    "shape whose product overflows": container({"a": entry(shape=(1 << 40, 1 << 40))}, b"1234"),
    "negative size": container({"a": entry(shape=(-4,))}, b"1234"),
    "size that is a float": container({"a": entry(shape=(4.0,))}, b"1234"),
    "size that is a bool": container({"a": entry(shape=(True, 4))}, b"1234"),
    "33 dimensions": container({"a": entry(shape=(1,) * 32 + (4,))}, b"1234"),
    "overlap": container({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456"),
    "gap": container({"a": entry(), "b": entry(offsets=(5, 9))}, b"123456789"),
    "bytes behind the last tensor": container({"a": entry()}, b"12345"),
    "name too long": container({"a" * 2000: entry()}, b"1234"),
    "name with a control character": container({"a\u0000b": entry()}, b"1234"),
    "metadata that is no text": container({"__metadata__": {"a": 1}, "a": entry()}, b"1234"),
    "unknown data type": container({"a": entry(dtype="F7")}, b"1234"),
    "half a float4 pair": container({"a": entry(dtype="F4", shape=(3,), offsets=(0, 1))}, b"1"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_on_the_container_is_refused_without_allocating(attack: str) -> None:
    data = ATTACKS[attack]
    tracemalloc.start()
    try:
        with pytest.raises(RefuseError):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_files_of_safetensors_itself_are_read() -> None:
    tensors = {"a": torch.arange(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16), "c": torch.zeros(())}
    data = save(tensors, metadata={"format": "pt"})
    header = parse_header(data[8 : 8 + header_length(data[:8], len(data))], len(data))
    assert {k: e.shape for k, e in header.entries.items()} == {"a": (3,), "b": (2, 2), "c": ()}
    assert header.metadata == {"format": "pt"}


def test_a_patch_is_a_safetensors_file_that_other_tools_open() -> None:
    found = load(make())
    assert set(found) == {"tensors/new", "thinwire.segments", "thinwire.table"}
    assert found["tensors/new"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("level", ["fast", "small", "smallest"])
@pytest.mark.parametrize("values", ["ulp", "absolute"])
def test_a_patch_reads_back_as_it_was_written(level: str, values: str) -> None:
    data = make(level, values)
    patch = Patch.parse(data)
    assert b"".join(patch.encode()) == data
    assert [row.kind for row in patch.rows] == ["sparse", "raw", "sparse"]
    assert patch.removed == ("gone",)


def rewritten(change: object) -> bytes:
    """The patch with its table, as JSON values, passed through ``change``."""
    data = make()
    length = header_length(data[:8], len(data))
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    start, stop = header["thinwire.table"]["data_offsets"]
    table = json.loads(zstandard.ZstdDecompressor().decompress(body[start:stop]))
    changed = change(table)  # type: ignore[operator]
    packed = changed if isinstance(changed, bytes) else zstandard.ZstdCompressor().compress(canonical.dump(table))
    grown = len(packed) - (stop - start)
    for value in header.values():
        if "data_offsets" in value and value["data_offsets"][0] >= stop:
            value["data_offsets"] = [n + grown for n in value["data_offsets"]]
    header["thinwire.table"].update(data_offsets=[start, start + len(packed)], shape=[len(packed)])
    return container(header, body[:start] + packed + body[stop:])


def set_segment(column: int, value: int) -> object:
    def change(table: dict[str, list[list[object]]]) -> None:
        table["segments"][0][column] = value

    return change


TABLE_ATTACKS = {
    "not zstd": lambda t: b"garbage",
    "a bomb of 65 MiB in a few KiB": lambda t: zstandard.ZstdCompressor().compress(b"[" * (65 << 20)),
    "nested too deep": lambda t: zstandard.ZstdCompressor().compress(b"[" * (1 << 20)),
    "no size in the frame": lambda t: zstandard.ZstdCompressor(write_content_size=False).compress(canonical.dump(t)),
    "not canonical": lambda t: zstandard.ZstdCompressor().compress(json.dumps(t, indent=1).encode()),
    "tensors missing": lambda t: t.pop("tensors") and None,
    "a tensor twice": lambda t: t["tensors"].append(t["tensors"][-1]),
    "an unknown kind": lambda t: t["tensors"][0].__setitem__(3, "magic"),
    "more changes than cells": lambda t: t["tensors"][0].__setitem__(4, 8),
    "negative changes": lambda t: t["tensors"][0].__setitem__(4, -1),
    "a tensor not in the file": lambda t: t["tensors"][0].__setitem__(3, "raw"),
    "raw tensor turned sparse": lambda t: t["tensors"][1].__setitem__(3, "sparse"),
    "removed and there": lambda t: t["removed"].append("w"),
    "alias to nothing": lambda t: t["aliases"].__setitem__("x", "nothing"),
    "alias of itself": lambda t: t["aliases"].__setitem__("w", "w"),
    "segment with too many cells": set_segment(1, 1 << 30),
    "segment with no cells": set_segment(1, 0),
    "segment with more changes than cells": set_segment(2, 1000),
    "segment whose size is off": set_segment(3, 10**6),
    "segment of another type": set_segment(0, "F16"),  # type: ignore[arg-type]
    "a segment too many": lambda t: t["segments"].append(["U8", 5, 0, 0]),
}


@pytest.mark.parametrize("attack", TABLE_ATTACKS)
def test_attack_on_the_table_is_refused_without_allocating(attack: str) -> None:
    data = rewritten(TABLE_ATTACKS[attack])
    tracemalloc.start()
    try:
        with pytest.raises(RefuseError):
            Patch.parse(data)
        assert tracemalloc.get_traced_memory()[1] < (8 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("field", ["parent", "result", "hash", "values", "format", "version"])
def test_a_patch_without_a_needed_fact_is_refused(field: str) -> None:
    data = make()
    length = header_length(data[:8], len(data))
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"][field]
    with pytest.raises(RefuseError):
        Patch.parse(container(header, data[8 + length :]))


def test_a_newer_format_says_upgrade() -> None:
    data = make()
    length = header_length(data[:8], len(data))
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["version"] = "2"
    with pytest.raises(UnsupportedError, match="upgrade"):
        Patch.parse(container(header, data[8 + length :]))


@given(cut=st.integers(0, 10**9))
def test_a_truncated_patch_is_refused(cut: int) -> None:
    data = make()
    with pytest.raises(MalformedError):
        Patch.parse(data[: cut % len(data)])


@given(where=st.integers(0, 10**9), flip=st.integers(1, 255))
def test_a_flipped_byte_raises_only_our_errors(where: int, flip: int) -> None:
    data = bytearray(make())
    data[where % len(data)] ^= flip
    try:
        Patch.parse(bytes(data))
    except ThinwireError:
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=10,
)


@given(JSON)
def test_canonical_json_is_read_back_and_nothing_else_is(value: object) -> None:
    data = canonical.dump(value)
    assert canonical.parse(data, bytes_max=1 << 20) == value
    with pytest.raises(MalformedError):
        canonical.parse(data + b" ", bytes_max=1 << 20)


def test_a_state_of_many_dtypes_makes_a_patch_whose_counts_add_up() -> None:
    old = {f"t{i}": torch.zeros(50, dtype=d) for i, d in enumerate((torch.bool, torch.int64, torch.float16))}
    new = {k: v.clone() for k, v in old.items()}
    new["t1"][3] = 7
    new["t2"][:5] = 1
    patch = make_patch(take_snapshot(StateSource(state_of(old))), StateSource(state_of(new)))
    assert {row.name: row.changed for row in patch.rows} == {"t0": 0, "t1": 1, "t2": 5}
    assert np.isclose(patch.changed / patch.cells, 6 / 150)

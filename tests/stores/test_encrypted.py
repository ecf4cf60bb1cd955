"""EncryptedStore keeps the contract of a store; what was altered, cut, moved or sealed by others is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.errors import DamagedObjectError, MisuseError, UntrustedError
from thinwire.stores.encrypted import CHUNK_BYTES, EncryptedStore, object_key_text, read_object_keys, sealed_size
from thinwire.stores.local import LocalStore
from thinwire.stores.memory import MemoryStore
from thinwire.testing.stores import StoreContract

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


class TestContract(StoreContract):
    large_bytes = (3 << 20) + 5

    @pytest.fixture
    def store(self) -> EncryptedStore:
        return EncryptedStore(MemoryStore(), [KEY])


class TestContractOfAFolder(StoreContract):
    large_bytes = 2 << 20  # the last chunk is full

    @pytest.fixture
    def store(self, tmp_path: Path) -> EncryptedStore:
        return EncryptedStore(LocalStore(tmp_path / "sealed", fsync=False), [KEY])


def sealed(data: bytes, key: str = "a") -> tuple[MemoryStore, EncryptedStore, bytes]:
    inner = MemoryStore()
    store = EncryptedStore(inner, [KEY])
    store.put(key, [data])
    return inner, store, inner.get(key, size_max=1 << 30)


SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_a_chunks_border(size: int) -> None:
    data = os.urandom(size)
    _, store, raw = sealed(data)
    assert len(raw) == sealed_size(size)
    assert store.head("a").size == size == next(iter(store.list(""))).size
    assert store.get("a", size_max=size) == data
    half = bytes(memoryview(data)[: size // 2])
    store.put("b", [half, data[len(half) :]])
    assert store.get("b", size_max=size) == data


@settings(max_examples=30)
@given(data=st.data())
def test_a_range_is_that_of_the_whole(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(SIZES[3:]))
    whole = bytes(range(251)) * (size // 251 + 1)
    whole = whole[:size]
    _, store, _ = sealed(whole)
    start = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - start))
    assert store.get_range("a", start, length) == whole[start : start + length]


@settings(max_examples=60)
@given(at=st.integers(0, sealed_size(300) - 1), bit=st.integers(0, 7))
def test_any_bit_that_was_flipped_is_found(at: int, bit: int) -> None:
    inner, store, raw = sealed(bytes(300))
    changed = bytearray(raw)
    changed[at] ^= 1 << bit
    inner.put("a", [bytes(changed)])
    with pytest.raises((DamagedObjectError, UntrustedError)):
        store.get("a", size_max=300)
    with pytest.raises((DamagedObjectError, UntrustedError)):
        store.get_range("a", 7, 5)


@given(keep=st.integers(0, sealed_size(40) - 1))
def test_an_object_that_was_cut_off_is_found(keep: int) -> None:
    inner, store, raw = sealed(bytes(40))
    inner.put("a", [raw[:keep]])
    with pytest.raises(DamagedObjectError):
        store.get("a", size_max=40)


def test_an_object_that_was_cut_off_or_grew_at_a_chunks_border_is_found() -> None:
    inner, store, raw = sealed(bytes(2 * CHUNK_BYTES))
    stride = CHUNK_BYTES + 16
    for changed in (raw[: 64 + stride], raw + raw[-stride:], raw[:64] + raw[64 + stride :] + raw[64 : 64 + stride]):
        inner.put("a", [changed])
        with pytest.raises(DamagedObjectError):
            store.get("a", size_max=4 * CHUNK_BYTES)
    inner.put("a", [raw[: 64 + stride]])
    with pytest.raises(DamagedObjectError):
        store.get_range("a", 0, 10)  # it is chunk 0, and says it is not the last


def test_objects_do_not_change_places() -> None:
    inner, store, raw = sealed(b"one")
    inner.put("b", [raw])
    with pytest.raises(DamagedObjectError, match="another key"):
        store.get("b", size_max=3)


def test_plain_objects_are_not_taken_for_sealed_ones() -> None:
    inner, store, _ = sealed(b"one")
    for data in (b"", b"plain", bytes(80), bytes(200)):
        inner.put("a", [data])
        with pytest.raises(DamagedObjectError):
            store.get("a", size_max=1000)
        with pytest.raises(DamagedObjectError):
            store.get_range("a", 0, 1)


def test_keys_are_rotated_by_putting_the_new_one_first() -> None:
    inner, store, _ = sealed(b"old")
    with pytest.raises(UntrustedError, match="was not given"):
        EncryptedStore(inner, [OTHER]).get("a", size_max=3)
    both = EncryptedStore(inner, [OTHER, KEY])
    both.put("b", [b"new"])
    assert (both.get("a", size_max=3), both.get("b", size_max=3)) == (b"old", b"new")
    assert EncryptedStore(inner, [OTHER]).get("b", size_max=3) == b"new"
    with pytest.raises(UntrustedError):
        store.get("b", size_max=3)


def test_two_writes_of_the_same_bytes_have_nothing_in_common() -> None:
    inner, store, first = sealed(bytes(1000))
    store.put("a", [bytes(1000)])
    second = inner.get("a", size_max=1 << 20)
    assert len(first) == len(second)
    assert first[:32] == second[:32]
    assert all(first[at : at + 8] != second[at : at + 8] for at in range(32, len(first) - 8))


def test_keys_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    for keys in ([], [b"short"], KEY):
        with pytest.raises(MisuseError, match="32 bytes"):
            EncryptedStore(MemoryStore(), keys)  # type: ignore[arg-type]
    path = tmp_path / "key"
    path.write_text(object_key_text(KEY))
    path.chmod(0o644)
    with pytest.raises(MisuseError, match="chmod 600"):
        read_object_keys([path])
    path.chmod(0o600)
    assert read_object_keys([path]) == [KEY]
    path.write_text("thinwire-aes256 00\n")
    with pytest.raises(MisuseError, match="keygen --objects"):
        read_object_keys([path])
    with pytest.raises(MisuseError, match="cannot read"):
        read_object_keys([tmp_path / "none"])

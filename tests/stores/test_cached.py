"""CachedStore keeps the contract of a store, asks the origin once, and is never worse than no cache at all."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stores.caching import KEY, counted, files
from thinwire.errors import (
    DamagedObjectError,
    MisuseError,
    ObjectNotFoundError,
    RefetchError,
    ThinwireError,
)
from thinwire.stores.cached import CachedStore, cached
from thinwire.stores.encrypted import EncryptedStore
from thinwire.stores.local import LocalStore
from thinwire.stores.memory import MemoryStore
from thinwire.stores.protocol import Distrust, Store
from thinwire.testing.faults import FaultyStore
from thinwire.testing.stores import StoreContract


class TestContract(StoreContract):
    large_bytes = 5 << 20
    race_rounds = 2

    @pytest.fixture
    def store(self, tmp_path: Path) -> CachedStore:
        return CachedStore(MemoryStore(), tmp_path)


class TestContractOfWhatIsKeptForEver(StoreContract):
    """Every key is one that never changes, though the contract changes them: through the cache itself that is seen."""

    large_bytes = 2 << 20
    race_rounds = 2

    @pytest.fixture
    def store(self, tmp_path: Path) -> CachedStore:
        return CachedStore(FaultyStore(MemoryStore()), tmp_path, immutable=".+")  # an inner store without wait_for


# --- what is kept, and for how long --------------------------------------------------------------------------------


def test_an_object_is_asked_for_once_and_a_manifest_for_a_while(tmp_path: Path) -> None:
    inner, origin = counted(**{KEY: b"patch", "manifests/0000000001.json": b"one", "latest.json": b"1"})
    workers = [CachedStore(origin, tmp_path, fresh_s=0, settled_s=1000) for _ in range(3)]
    for key, times in ((KEY, 1), ("manifests/0000000001.json", 1), ("latest.json", 3)):
        before = origin.count("get")
        assert {worker.get(key, size_max=100) for worker in workers} == {inner.get(key, size_max=100)}
        assert origin.count("get") - before == times
    impatient = CachedStore(origin, tmp_path, fresh_s=0, settled_s=0)
    before = origin.count("get")
    impatient.get("manifests/0000000001.json", size_max=100)
    impatient.get(KEY, size_max=100)
    assert origin.count("get") == before + 1


@pytest.mark.parametrize("key", ["latest.json", "heartbeat.json", "trust/0000000002.json"])
def test_what_changes_is_shared_for_an_instant_only(tmp_path: Path, key: str) -> None:
    inner, origin = counted(**{key: b"old"})
    store = CachedStore(origin, tmp_path, fresh_s=0.2)
    assert store.get(key, size_max=9) == store.get(key, size_max=9) == b"old"
    assert origin.count("get") == 1
    inner.put(key, [b"new"])
    time.sleep(0.25)
    assert store.get(key, size_max=9) == b"new"


def test_that_an_object_is_not_there_is_shared_for_an_instant_whatever_its_key(tmp_path: Path) -> None:
    inner, origin = counted()
    store = CachedStore(origin, tmp_path, fresh_s=0.2)
    for _ in range(5):
        with pytest.raises(ObjectNotFoundError):
            store.get(KEY, size_max=9)
    assert origin.count("get") == 1
    inner.put(KEY, [b"there"])
    time.sleep(0.25)
    assert store.get(KEY, size_max=9) == b"there"


def test_listings_are_shared_for_an_instant(tmp_path: Path) -> None:
    inner, origin = counted(**{"manifests/1": b"x"})
    stores = [CachedStore(origin, tmp_path, fresh_s=0.2) for _ in range(2)]
    for store in stores:
        assert [info.key for info in store.list("manifests/")] == ["manifests/1"]
        assert [info.key for info in store.list("manifests/", start_after="manifests/1")] == []
    assert origin.count("list") == 2
    inner.put("manifests/2", [b"x"])
    time.sleep(0.25)
    assert len(list(stores[1].list("manifests/"))) == 2


def test_a_long_listing_is_whole_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinwire.stores.cached._LISTED_MAX", 5)
    _, origin = counted(**{f"a/{n}": b"x" for n in range(9)})
    store = CachedStore(origin, tmp_path, fresh_s=100)
    for _ in range(2):
        assert [info.key for info in store.list("a/")] == [f"a/{n}" for n in range(9)]
    assert origin.count("list") == 2


def test_ranges_come_from_the_entry_or_from_the_origin(tmp_path: Path) -> None:
    _, origin = counted(**{KEY: bytes(range(100))})
    store = CachedStore(origin, tmp_path)
    assert store.get_range(KEY, 10, 5) == bytes(range(10, 15))
    store.get(KEY, size_max=100)
    for start, length in ((0, 100), (99, 1), (50, 0)):
        assert store.get_range(KEY, start, length) == bytes(range(start, start + length))
    assert origin.count("get_range") == 1
    with pytest.raises(DamagedObjectError):
        store.get_range(KEY, 99, 2)


def test_two_origins_share_a_folder_and_no_entry(tmp_path: Path) -> None:
    stores = []
    for name in ("one", "two"):
        inner = LocalStore(tmp_path / name, fsync=False)
        inner.put(KEY, [name.encode()])
        stores.append(CachedStore(inner, tmp_path / "cache"))
    assert [store.get(KEY, size_max=9) for store in stores * 2] == [b"one", b"two"] * 2


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["get", "get_range", "put", "create", "delete", "list", "head", "distrust"]),
        st.sampled_from([KEY, "manifests/0000000001.json", "a", "a.b"]),
        st.binary(max_size=6),
    ),
    max_size=12,
)


def outcome(store: Store, verb: str, key: str, data: bytes) -> object:
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: store.get(key, size_max=len(data)),
        "get_range": lambda: store.get_range(key, len(data) // 2, len(data) // 2),
        "put": lambda: store.put(key, [data]),
        "create": lambda: store.create(key, [data]),
        "delete": lambda: store.delete(key),
        "list": lambda: [(info.key, info.size) for info in store.list(key[: len(data)])],
        "head": lambda: store.head(key).size,
        "distrust": lambda: store.distrust(key) if isinstance(store, Distrust) else None,
    }
    try:
        return calls[verb]()
    except ThinwireError as error:
        return type(error)


@given(operations=OPERATIONS)
@settings(max_examples=40)
def test_what_is_done_through_a_cache_is_as_without_one(operations: list[tuple[str, str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain, cached = MemoryStore(), CachedStore(MemoryStore(), folder, fresh_s=1000)
        for verb, key, data in operations:
            assert outcome(cached, verb, key, data) == outcome(plain, verb, key, data), (verb, key, data)


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty", "other"])
def test_a_small_entry_that_the_disk_damaged_is_asked_for_anew(tmp_path: Path, damage: str) -> None:
    _, origin = counted(**{KEY: bytes(1000), "objects/other": b"other"})
    store = CachedStore(origin, tmp_path)
    store.get("objects/other", size_max=9)
    (other,) = files(tmp_path)
    store.get(KEY, size_max=1000)
    (path,) = set(files(tmp_path)) - {other}
    raw = bytearray(path.read_bytes())
    raw[-500] ^= 1
    changed = {"flip": bytes(raw), "cut": raw[:-1], "grow": raw + b"x", "empty": b"", "other": other.read_bytes()}
    path.write_bytes(changed[damage])
    assert store.get(KEY, size_max=1000) == bytes(1000)
    assert origin.count("get") == 3
    assert store.get(KEY, size_max=1000) == bytes(1000)
    assert origin.count("get") == 3


@settings(max_examples=30)
@given(data=st.data())
def test_no_bytes_in_the_folder_make_a_reader_fail(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        _, origin = counted(**{KEY: bytes(50)})
        CachedStore(origin, name).get(KEY, size_max=50)
        (path,) = files(Path(name))
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
        got: object = None
        try:
            got = CachedStore(origin, name).get(KEY, size_max=50)
        except RefetchError:
            got = "asked again, or said to be absent"
        assert got in (bytes(50), "asked again, or said to be absent")


def test_an_entry_that_is_a_link_a_pipe_or_a_folder_is_not_read(tmp_path: Path) -> None:
    _, origin = counted(**{KEY: b"patch"})
    store = CachedStore(origin, tmp_path / "cache")
    store.get(KEY, size_max=9)
    (path,) = files(tmp_path / "cache")
    kept = path.read_bytes()
    (tmp_path / "elsewhere").write_bytes(kept)
    for make in (lambda: path.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(path), path.mkdir):
        path.unlink() if path.exists() or path.is_symlink() else None
        make()
        before = origin.count("get")
        assert store.get(KEY, size_max=9) == b"patch"
        assert origin.count("get") == before + 1


def test_distrust_drops_the_entry_and_goes_on_to_the_next_cache(tmp_path: Path) -> None:
    inner, origin = counted(**{KEY: b"damaged on the way"})
    near = CachedStore(CachedStore(origin, tmp_path / "far"), tmp_path / "near")
    assert near.get(KEY, size_max=99) == b"damaged on the way"
    inner.put(KEY, [b"as it is"])
    assert near.get(KEY, size_max=99) == b"damaged on the way"
    near.distrust(KEY)
    assert near.get(KEY, size_max=99) == b"as it is"
    assert origin.count("get") == 2


def test_who_distrusts_what_another_has_replaced_since_drops_nothing(tmp_path: Path) -> None:
    inner, origin = counted(**{KEY: b"damaged"})
    first, second = (CachedStore(origin, tmp_path) for _ in range(2))
    assert first.get(KEY, size_max=99) == second.get(KEY, size_max=99) == b"damaged"
    inner.put(KEY, [b"mended"])
    first.distrust(KEY)
    assert first.get(KEY, size_max=99) == b"mended"
    second.distrust(KEY)
    assert second.get(KEY, size_max=99) == b"mended"
    assert origin.count("get") == 2


# --- around other stores -------------------------------------------------------------------------------------------


def test_encryption_goes_around_a_cache(tmp_path: Path) -> None:
    keys, inner = [bytes(32)], MemoryStore()
    with pytest.raises(MisuseError, match="outside"):
        CachedStore(EncryptedStore(inner, keys), tmp_path)
    store = EncryptedStore(CachedStore(inner, tmp_path), keys)
    store.put(KEY, [b"secret weights"])
    assert store.get(KEY, size_max=99) == store.get(KEY, size_max=99) == b"secret weights"
    assert files(tmp_path)
    assert all(b"secret" not in path.read_bytes() for path in files(tmp_path))


def test_a_cache_goes_beneath_encryption_and_around_the_rest(tmp_path: Path) -> None:
    inner = MemoryStore()
    assert cached(inner, None, poll_s=1.0) is inner
    plain = cached(inner, tmp_path, poll_s=1.0)
    assert isinstance(plain, CachedStore)
    assert plain.fresh_s == 0.25
    store = cached(EncryptedStore(inner, [bytes(32)]), tmp_path, poll_s=1.0)
    assert isinstance(store, EncryptedStore)
    assert isinstance(store.inner, CachedStore)
    assert isinstance(store, Distrust)
    store.put(KEY, [b"secret weights"])
    assert store.get(KEY, size_max=99) == b"secret weights"
    assert all(b"secret" not in path.read_bytes() for path in files(tmp_path))


@pytest.mark.parametrize("wrong", [{"bytes_max": 0}, {"fresh_s": -1}, {"settled_s": -1}, {"patience_s": -0.1}])
def test_misuse_is_refused(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(MisuseError):
        CachedStore(MemoryStore(), tmp_path, **wrong)  # type: ignore[arg-type]


def test_what_it_does_not_change_is_the_inner_stores(tmp_path: Path) -> None:
    inner = MemoryStore("cached-docs")
    store = CachedStore(inner, tmp_path)
    assert (store.url, store.create_is_atomic, store.inner) == (inner.url, True, inner)
    inner.create_is_atomic = False  # type: ignore[attr-defined]
    assert CachedStore(inner, tmp_path).create_is_atomic is False

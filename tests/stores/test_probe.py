"""The probe tells stores that keep the first object from those that do not."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator

import pytest

from thinwire.errors import ObjectExistsError, StoreUnavailableError, UnsafeStoreError
from thinwire.stores import Blob, Store, enforces_create
from thinwire.stores.memory import MemoryStore
from thinwire.testing.faults import Fault, FaultyStore


class Wrapped:
    """A MemoryStore whose create is replaced by a subclass."""

    def __init__(self) -> None:
        self.inner = MemoryStore()
        self.get = self.inner.get
        self.delete = self.inner.delete

    def create(self, key: str, data: Blob) -> None:
        raise NotImplementedError


class Overwrites(Wrapped):
    """What S3 servers without conditional put do: the condition is ignored."""

    def create(self, key: str, data: Blob) -> None:
        self.inner.put(key, data)


class OverwritesAndRefuses(Wrapped):
    """Says the right thing and does the wrong one."""

    def create(self, key: str, data: Blob) -> None:
        taken = [info.key for info in self.inner.list(key)]
        self.inner.put(key, data)
        if taken:
            raise ObjectExistsError("taken")


class IgnoresSilently(Wrapped):
    """Keeps the first object, but does not tell the second writer."""

    def create(self, key: str, data: Blob) -> None:
        with contextlib.suppress(ObjectExistsError):
            self.inner.create(key, data)


class LooksThenWrites(Wrapped):
    """Right as long as one looks after the other; in the race all look first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count(1)
        self.all_have_looked = threading.Barrier(4)

    def create(self, key: str, data: Blob) -> None:
        call = next(self.calls)
        taken = bool(list(self.inner.list(key)))
        if call > 2:  # the race
            self.all_have_looked.wait(timeout=60)
        if taken:
            raise ObjectExistsError("taken")
        self.inner.put(key, data)


class Knows(Wrapped):
    def create(self, key: str, data: Blob) -> None:
        raise UnsafeStoreError(f"no conditional put of {len(data)} buffers to {key} here")


@pytest.mark.parametrize("kind", [Overwrites, OverwritesAndRefuses, IgnoresSilently, LooksThenWrites, Knows])
def test_stores_that_do_not_enforce_create_are_found_out(kind: type[Wrapped]) -> None:
    store = kind()
    assert not enforces_create(store)
    assert list(store.inner.list("")) == []


def test_what_a_store_says_of_itself_is_believed_without_a_request() -> None:
    store = FaultyStore(MemoryStore())
    store.inner.create_is_atomic = False  # type: ignore[attr-defined]
    assert not enforces_create(store)
    assert store.log == []


def test_the_probe_does_not_answer_when_the_store_does_not() -> None:
    with pytest.raises(StoreUnavailableError):
        enforces_create(FaultyStore(MemoryStore(), [Fault("create", 1, "unavailable")]))
    with pytest.raises(StoreUnavailableError):
        enforces_create(FaultyStore(MemoryStore(), [Fault("create", 3, "unavailable", times=4)]))


def test_a_store_that_does_not_let_us_delete_is_probed_all_the_same() -> None:
    inner = MemoryStore()
    assert enforces_create(FaultyStore(inner, [Fault("delete", 1, "unavailable", times=2)]))
    assert [info.key[:6] for info in inner.list("")] == ["probe/", "probe/"]


def test_one_lost_reply_in_the_race_is_not_proof_of_anything() -> None:
    store: Store = FaultyStore(MemoryStore(), [Fault("create", 3, "lost-reply", times=4)])
    with pytest.raises(StoreUnavailableError):
        enforces_create(store)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before

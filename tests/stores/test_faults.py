"""FaultyStore is a store when nothing is planned, and fails exactly as planned."""

from __future__ import annotations

import pytest

from thinwire.errors import (
    DamagedObjectError,
    MisuseError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreUnavailableError,
)
from thinwire.stores.memory import MemoryStore
from thinwire.testing.faults import Fault, FaultyStore, Kind, Operation, SimulatedCrash
from thinwire.testing.stores import StoreContract


class TestContractWithoutFaults(StoreContract):
    @pytest.fixture
    def store(self) -> FaultyStore:
        return FaultyStore(MemoryStore())


@pytest.fixture
def inner() -> MemoryStore:
    store = MemoryStore()
    store.put("a", [b"aaaa"])
    store.put("b", [b"bbbb"])
    return store


def keys(store: MemoryStore | FaultyStore) -> list[str]:
    return [info.key for info in store.list("")]


def test_unavailable_does_nothing_and_passes(inner: MemoryStore) -> None:
    store = FaultyStore(inner, [Fault("create", 1, "unavailable", times=2)])
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            store.create("c", [b"x"])
    assert keys(inner) == ["a", "b"]
    store.create("c", [b"x"])
    assert keys(inner) == ["a", "b", "c"]


@pytest.mark.parametrize("verb", ["put", "create"])
def test_a_lost_reply_is_done(inner: MemoryStore, verb: str) -> None:
    store = FaultyStore(inner, [Fault("write", 1, "lost-reply")])
    with pytest.raises(StoreUnavailableError):
        getattr(store, verb)("c", [b"x"])
    assert inner.get("c", size_max=1) == b"x"


def test_the_reply_that_is_lost_may_be_a_refusal(inner: MemoryStore) -> None:
    store = FaultyStore(inner, [Fault("create", 1, "lost-reply")])
    with pytest.raises(StoreUnavailableError):
        store.create("a", [b"other"])
    with pytest.raises(ObjectExistsError):
        store.create("a", [b"other"])


def test_missing(inner: MemoryStore) -> None:
    store = FaultyStore(inner, [Fault("read", 1, "missing", times=2, key="b")])
    assert store.get("a", size_max=4) == b"aaaa"
    with pytest.raises(ObjectNotFoundError):
        store.get("b", size_max=4)
    with pytest.raises(ObjectNotFoundError):
        store.head("b")
    assert store.get("b", size_max=4) == b"bbbb"


@pytest.mark.parametrize(("kind", "got"), [("short", b"bb"), ("flip", b"bbcb"), ("swap", b"aaaa")])
def test_wrong_bytes(inner: MemoryStore, kind: Kind, got: bytes) -> None:
    store = FaultyStore(inner, [Fault("get", 1, kind), Fault("get_range", 1, kind)])
    assert store.get("b", size_max=4) == got
    assert store.get_range("b", 0, 4) == got
    assert store.get("b", size_max=4) == b"bbbb"


def test_a_swapped_object_is_still_bounded(inner: MemoryStore) -> None:
    inner.put("c", [bytes(100)])
    with pytest.raises(DamagedObjectError):
        FaultyStore(inner, [Fault("get", 1, "swap")]).get("b", size_max=4)


def test_a_stale_list_shows_what_was_there_before_the_last_writes() -> None:
    for stale_writes, wanted in [(0, ["b", "c"]), (1, ["a", "b", "c"]), (2, ["a", "b", "c"]), (9, ["a", "b"])]:
        fresh = MemoryStore()
        for key in ("a", "b"):
            fresh.put(key, [b"before"])
        store = FaultyStore(fresh, [Fault("list", 2, "stale")], stale_writes=stale_writes)
        store.create("c", [b"new"])
        store.put("b", [b"replaced"])
        store.delete("a")
        assert keys(store) == ["b", "c"]
        stale = list(store.list(""))
        assert [info.key for info in stale] == wanted
        assert next(info for info in stale if info.key == "b").size == (6 if stale_writes >= 2 else 8)
        assert keys(store) == ["b", "c"]


@pytest.mark.parametrize(
    ("kind", "written"), [("crash-before", ["a", "b", "c"]), ("crash-after", ["a", "b", "c", "d"])]
)
def test_a_crash_ends_everything(inner: MemoryStore, kind: Kind, written: list[str]) -> None:
    store = FaultyStore(inner, [Fault("write", 2, kind)])
    store.put("c", [b"x"])
    with pytest.raises(SimulatedCrash):
        store.create("d", [b"x"])
    with pytest.raises(SimulatedCrash):  # an orderly clean-up does not happen in a dead process
        store.delete("c")
    with pytest.raises(SimulatedCrash):
        store.get("a", size_max=4)
    assert keys(inner) == written
    assert store.crashed
    assert store.count("write") == 2
    assert not isinstance(SimulatedCrash(), Exception)


def test_a_rule_instead_of_a_list(inner: MemoryStore) -> None:
    def every_third(operation: Operation) -> Kind | None:
        return "unavailable" if operation.index % 3 == 2 else None

    store = FaultyStore(inner, every_third)
    outcomes = []
    for _ in range(6):
        try:
            store.head("a")
            outcomes.append("fine")
        except StoreUnavailableError:
            outcomes.append("failed")
    assert outcomes == ["fine", "fine", "failed"] * 2
    assert [operation.nth for operation in store.log] == [1, 2, 3, 4, 5, 6]


def test_latency_and_bandwidth(inner: MemoryStore) -> None:
    waits: list[float] = []
    store = FaultyStore(inner, latency_s=0.25, bandwidth=8.0, sleep=waits.append)
    store.get("a", size_max=4)
    store.put("c", [b"xx", b"yy"])
    store.head("a")
    assert waits == [0.25, 0.5, 0.25, 0.5, 0.25]


def test_a_plan_that_makes_no_sense_is_told(inner: MemoryStore) -> None:
    with pytest.raises(MisuseError):
        FaultyStore(inner, [Fault("any", 1, "flip")]).put("a", [b"x"])
    with pytest.raises(MisuseError):
        FaultyStore(inner, [Fault("get", 1, "stale")]).get("a", size_max=4)

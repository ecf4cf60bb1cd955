"""Reads from others' memory: the carrier over an engine of this process, and over NIXL and Mooncake where installed."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.peers.engines import Copying
from tests.peers.processes import Workers
from tests.peers.running import run_threads
from thinwire.errors import MisuseError, RetryError
from thinwire.peers.rdma import Rdma
from thinwire.peers.rendezvous import HINT_KEY, Rendezvous, Tickets, hint_bytes
from thinwire.stores.memory import MemoryStore
from thinwire.testing.peers import CarrierContract, JointContract, body

KEY = "objects/0000000001-ab/delta.safetensors"
SIZE = 200_000


class TestContract(CarrierContract):
    sizes = (100_000, (1 << 20) + 5)

    def run(self, scenario: Callable[..., Any], *args: Any) -> list[Any]:
        return run_threads([Rdma(Copying()) for _ in range(self.parties)], scenario, *args)


class TestJointContract(JointContract):
    def carrier(self) -> Rdma:
        return Rdma(Copying())


def got(carrier: Rdma, size_max: int = SIZE) -> bytes | None:
    return carrier.fetch(KEY, size_max=size_max, stall_s=2, progress=lambda _: None)


@pytest.fixture
def run() -> Iterator[tuple[MemoryStore, Callable[..., Rdma]]]:
    """A store, and a way to make workers that join it; the first one publishes."""
    store, made = MemoryStore(), []

    def join(fault: str = "", **options: Any) -> Rdma:
        carrier = Rdma(Copying(fault), **options)
        carrier.join(store, publishing=not made)
        made.append(carrier)
        return carrier

    yield store, join
    for carrier in made:
        carrier.leave()


def settled(carrier: Rdma, other: Rdma) -> None:
    """Wait until ``other`` is told that ``carrier`` holds the object."""
    tickets = other._tickets()
    assert tickets is not None
    deadline = time.monotonic() + 20
    while not (found := any(t["holder"] == carrier._holder for t in tickets.get(KEY))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found


def test_what_was_read_is_offered_on(run: Any) -> None:
    _, join = run
    publisher, first, second = join(), join(), join()
    data = body(1, SIZE)
    publisher.offer(KEY, [data])
    assert got(first) == data
    settled(first, second)
    publisher.distrust(KEY)  # it gives it up
    assert got(second) == data
    assert second._came_from[KEY] == first._holder


def test_a_holder_that_lies_is_not_asked_again(run: Any) -> None:
    _, join = run
    publisher, reader = join(), join(fault="lies")
    data = body(2, SIZE)
    publisher.offer(KEY, [data])
    wrong = got(reader)
    assert wrong is not None
    assert wrong != data
    reader.distrust(KEY)
    assert got(reader) is None
    assert reader._held == {}


def test_transfers_that_fail_are_told_after_all_holders_were_tried(run: Any) -> None:
    _, join = run
    publisher, other, reader = join(), join(), join(fault="fails")
    for holder in (publisher, other):
        holder.offer(KEY, [body(3, SIZE)])
    with pytest.raises(RetryError, match="planned"):
        got(reader)
    assert reader._engine.reads == 2


def test_memory_beyond_the_limit_is_given_up_oldest_first(run: Any) -> None:
    _, join = run
    publisher, reader = join(keep_bytes=2 * SIZE), join()
    for n in range(4):
        publisher.offer(f"objects/{n}", [body(n, SIZE)])
    assert list(publisher._held) == ["objects/2", "objects/3"]
    publisher.offer("objects/large", [body(9, 3 * SIZE)])
    assert len(publisher._held) == 2
    assert reader.fetch("objects/0", size_max=SIZE, stall_s=1, progress=lambda _: None) is None
    assert reader.fetch("objects/3", size_max=SIZE, stall_s=1, progress=lambda _: None) == body(3, SIZE)


@pytest.mark.parametrize(
    "ticket",
    [
        {"engine": "copying", "size": 10**15, "address": 1},
        {"engine": "copying", "size": -1, "address": 1},
        {"engine": "copying", "size": "1", "address": 1},
        {"engine": "nixl", "size": 1, "address": 1, "agent": ""},
        {"size": 1},
        {},
    ],
    ids=["huge", "negative", "text", "another-engine", "no-engine", "empty"],
)
def test_tickets_that_make_no_sense_are_passed_over(run: Any, ticket: dict[str, Any]) -> None:
    _, join = run
    publisher, reader = join(), join()
    publisher.offer("objects/other", [body(1, SIZE)])  # so that the hint is there
    tickets = publisher._tickets()
    assert tickets is not None
    tickets.put(KEY, ticket)
    assert got(reader) is None


def test_tickets_of_who_cannot_read_the_store_are_not_handed_to_native_code(run: Any) -> None:
    _, join = run
    publisher, reader = join(), join()
    data = body(1, SIZE)
    publisher.offer("objects/other", [data])
    stranger = Tickets(publisher._rendezvous.addresses, holder="stranger", secret=b"guessed")
    stranger.put(KEY, {"engine": "copying", "size": SIZE, "address": publisher._held["objects/other"].memory.address})
    assert got(reader) is None
    assert reader._engine.reads == 0


def test_a_rendezvous_that_runs_elsewhere_outlives_publishers(run: Any) -> None:
    store, join = run
    with Rendezvous("127.0.0.1") as meeting:
        publisher, reader, late = (join(rendezvous=meeting.addresses[0]) for _ in range(3))
        data = body(4, SIZE)
        publisher.offer(KEY, [data])
        assert got(reader) == data
        settled(reader, late)
        publisher.leave()
        assert got(late) == data
        assert b"secret" in store.get(HINT_KEY, size_max=4096)


def test_where_nobody_published_or_the_rendezvous_is_gone(run: Any) -> None:
    store, join = run
    _, reader = join(), join()
    assert got(reader) is None  # no hint yet
    store.put(HINT_KEY, [hint_bytes(["127.0.0.1:1"])])
    reader._hint = (float("-inf"), None)
    with pytest.raises(RetryError, match="no rendezvous"):
        got(reader)
    store.put(HINT_KEY, [b"rubbish"])
    reader._hint = (float("-inf"), None)
    assert got(reader) is None


def test_misuse() -> None:
    with pytest.raises(MisuseError, match="known: nixl, mooncake"):
        Rdma("carrier pigeon")
    with pytest.raises(MisuseError, match="options of nixl"):
        Rdma("nixl", protocol="tcp")
    with pytest.raises(MisuseError, match="above 0"):
        Rdma("nixl", keep_bytes=0)
    carrier = Rdma(Copying())
    carrier.join(MemoryStore(), publishing=False)
    with pytest.raises(MisuseError, match="another"):
        carrier.join(MemoryStore(), publishing=False)


@pytest.mark.parametrize(("name", "modules"), [("nixl", ("nixl_cu12", "nixl")), ("mooncake", ("mooncake",))])
def test_an_engine_that_is_not_installed_is_named_with_its_extra(
    name: str, modules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # what an import finds where there is nothing
        monkeypatch.setitem(sys.modules, f"{module}.engine", None)
    with pytest.raises(MisuseError, match=rf"thinwire\[{name}\]"):
        Rdma(name).join(MemoryStore(), publishing=False)


# --- the real engines, between processes: make test-peers -------------------------------------------------------------


def make(rank: int, size: int) -> Rdma:
    options = {"host": "127.0.0.1"} if os.environ["ENGINE"] == "mooncake" else {}
    return Rdma(os.environ["ENGINE"], **options)


def set_engine(rank: int, size: int, name: str) -> None:
    os.environ["ENGINE"] = name


class OfRealEngines(CarrierContract):
    engine, package = "", ""
    sizes = (100_000, (8 << 20) + 5)
    patience_s = 30.0

    workers: Workers

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _workers(cls) -> Iterator[None]:
        if importlib.util.find_spec(cls.package) is None:
            pytest.skip(f"{cls.engine} is not installed; make test-peers installs it")
        started = cls.workers = Workers(3)
        started.run(set_engine, cls.engine)
        yield
        started.close()

    def run(self, scenario: Callable[..., Any], *args: Any) -> list[Any]:
        return self.workers.play(make, scenario, *args)


@pytest.mark.slow
class TestNixl(OfRealEngines):
    engine, package = "nixl", "nixl_cu12"


@pytest.mark.slow
class TestMooncake(OfRealEngines):
    engine, package = "mooncake", "mooncake"

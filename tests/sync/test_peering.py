"""A store with peers: a store all the same; peers that lie, stall or fail cost time and nothing else."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch

from tests.sync.models import bits, nudge, small_model
from thinwire import Consumer, Publisher
from thinwire.errors import MisuseError
from thinwire.peers.memory import MemoryPeers, Room
from thinwire.stores.cached import CachedStore
from thinwire.stores.encrypted import EncryptedStore
from thinwire.stores.memory import MemoryStore
from thinwire.stores.protocol import Distrust, Notify
from thinwire.sync import peering
from thinwire.sync.peering import PeerStore, is_carried, leave, peered
from thinwire.testing.faults import Fault, FaultyStore
from thinwire.testing.peers import BadPeers
from thinwire.testing.stores import StoreContract

KEY = "objects/0000000001-ab/delta.safetensors"


class TestContract(StoreContract):
    large_bytes = 1 << 20
    race_rounds = 2

    @pytest.fixture
    def store(self) -> PeerStore:
        return PeerStore(MemoryStore(), MemoryPeers(Room()), publishing=True)


class TestContractOverBadPeers(StoreContract):
    large_bytes = 1 << 20
    race_rounds = 2

    @pytest.fixture
    def store(self) -> PeerStore:
        return PeerStore(MemoryStore(), BadPeers("fail"))


def pair(store: MemoryStore | FaultyStore, how: str | None = None) -> tuple[PeerStore, PeerStore]:
    """A trainer's store and a worker's, whose peers may be bad."""
    room = Room()
    inner = MemoryPeers(room)
    worker = inner if how is None else BadPeers(how, None if how in ("stall", "drip") else inner)  # type: ignore[arg-type]
    return PeerStore(store, MemoryPeers(room), publishing=True), PeerStore(store, worker, stall_s=0.2)


def test_objects_come_from_peers_and_the_rest_from_the_store() -> None:
    store = FaultyStore(MemoryStore())
    trainer, worker = pair(store)
    for key in (KEY, "skips/0000000002-0000000001/aa.safetensors"):
        trainer.put(key, [b"we", b"ights"])
        assert worker.get(key, size_max=7) == b"weights"
    assert store.count("get") == 0
    for key in (
        "manifests/0000000001.json",
        "latest.json",
        "skips/0000000002-0000000001.json",
        "trust/0000000001.json",
    ):
        trainer.put(key, [b"{}"])
        assert not is_carried(key)
        assert worker.get(key, size_max=2) == b"{}"
    assert store.count("get") == 4
    assert (worker.peer_bytes, worker.store_bytes) == (14, 0)


def test_what_a_worker_got_from_the_store_it_gives_on() -> None:
    store = FaultyStore(MemoryStore())
    store.put(KEY, [b"weights"])
    room = Room()
    first, second = (PeerStore(store, MemoryPeers(room)) for _ in range(2))
    assert first.get(KEY, size_max=7) == second.get(KEY, size_max=7) == b"weights"
    assert store.count("get") == 1
    assert (first.store_bytes, second.peer_bytes) == (7, 7)


@pytest.mark.parametrize("how", ["lie", "flip", "short", "long", "stall", "drip", "fail", "retry"])
def test_a_model_follows_bit_for_bit_whatever_peers_do(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peering, "_GRACE_S", 0.1)
    monkeypatch.setattr(peering, "_LOOK_S", 0.02)
    store, room = MemoryStore(), Room()
    trained, served = small_model(0), small_model(1)
    with Publisher(store, peers=MemoryPeers(room)) as publisher:
        publisher.publish(trained)
        inner = None if how in ("stall", "drip") else MemoryPeers(room)
        bad = BadPeers(how, inner)  # type: ignore[arg-type]
        worker = PeerStore(store, bad, stall_s=0.1)
        consumer = Consumer(worker)
        consumer.load(served)
        assert bits(served) == bits(trained)
        for seed in range(3):
            nudge(trained, seed)
            publisher.publish(trained)
            version = consumer.poll()
            assert version is not None
            version.apply(served)
            assert bits(served) == bits(trained)
        assert bad.asked
        assert worker.peer_bytes == 0 or how in ("lie", "flip", "short")  # which came, were found out, and came anew
        if how in ("lie", "flip"):
            assert bad.distrusted
        worker.leave()


def test_peers_that_fail_are_left_alone_for_a_while_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peering, "_REST_FIRST_S", 0.3)
    store = MemoryStore()
    bad = BadPeers("retry")
    worker = PeerStore(store, bad)
    for n in range(20):
        store.put(f"objects/{n}", [b"x"])
    with caplog.at_level(logging.WARNING):
        for n in range(10):
            assert worker.get(f"objects/{n}", size_max=1) == b"x"
    assert len(bad.asked) == 3  # once may be bad luck, three times in a row is not
    assert "the store is asked instead" in caplog.text
    time.sleep(0.4)
    worker.get("objects/11", size_max=1)
    assert len(bad.asked) == 4


def test_while_a_request_hangs_peers_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_REST_FIRST_S": 0.01, "_GRACE_S": 0.05, "_LOOK_S": 0.02}.items():
        monkeypatch.setattr(peering, name, value)
    store, bad = MemoryStore(), BadPeers("stall")
    worker = PeerStore(store, bad, stall_s=0.05)
    for n in range(5):
        store.put(f"objects/{n}", [b"x"])
        assert worker.get(f"objects/{n}", size_max=1) == b"x"
        time.sleep(0.05)
    assert bad.asked == ["objects/0"]
    bad.leave()  # the one that hangs comes back
    deadline = time.monotonic() + 20
    while worker._hanging and time.monotonic() < deadline:
        time.sleep(0.02)
    worker.get("objects/0", size_max=1)
    assert len(bad.asked) == 2


def test_a_store_that_fails_is_an_error_as_ever_and_peers_do_without_it() -> None:
    store = FaultyStore(MemoryStore(), [Fault("get", 1, "unavailable", times=100)])
    trainer, worker = pair(store)
    trainer.put(KEY, [b"weights"])
    assert worker.get(KEY, size_max=7) == b"weights"


def test_distrust_goes_through_every_wrapper(tmp_path: Path) -> None:
    store, room = FaultyStore(MemoryStore()), Room()
    sealed = peered(EncryptedStore(store, [bytes(32)]), MemoryPeers(room), publishing=True)
    assert isinstance(sealed, EncryptedStore)
    assert isinstance(sealed, Distrust)
    sealed.put(KEY, [b"weights"])
    assert isinstance(sealed.inner, PeerStore)
    reader = EncryptedStore(CachedStore(PeerStore(store, MemoryPeers(room)), tmp_path), [bytes(32)])
    assert reader.get(KEY, size_max=7) == b"weights"
    assert store.count("get") == 0  # encrypted bytes came from the peer
    assert isinstance(reader, Distrust)
    reader.distrust(KEY)
    assert reader.get(KEY, size_max=7) == b"weights"
    assert store.count("get") == 1


def test_what_travels_between_peers_is_encrypted_where_the_store_is() -> None:
    room, seen = Room(), MemoryPeers(Room())
    seen = MemoryPeers(room)
    sealed = peered(EncryptedStore(MemoryStore(), [bytes(32)]), MemoryPeers(room), publishing=True)
    seen.join(MemoryStore(), publishing=False)
    sealed.put(KEY, [b"weights" * 100])
    taken = seen.fetch(KEY, size_max=10_000, stall_s=1, progress=lambda _: None)
    assert taken is not None
    assert b"weights" not in taken
    leave(sealed)
    assert seen.fetch(KEY, size_max=10_000, stall_s=1, progress=lambda _: None) is None


def test_extras_and_attributes_of_the_store_are_passed_on() -> None:
    store = MemoryStore()
    worker = PeerStore(store, MemoryPeers(Room()))
    assert isinstance(worker, Notify)
    assert worker.url == store.url
    assert worker.create_is_atomic
    assert peered(store, None) is store
    with pytest.raises(AttributeError):
        worker.nothing  # noqa: B018
    leave(store)  # no peers: nothing to leave


def test_misuse() -> None:
    with pytest.raises(MisuseError, match="swarm"):
        Consumer(MemoryStore(), peers="pigeons")
    with pytest.raises(MisuseError, match="carrier"):
        Consumer(MemoryStore(), peers=3)  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="stall_s"):
        PeerStore(MemoryStore(), MemoryPeers(Room()), stall_s=0)
    carrier = MemoryPeers(Room())
    Publisher(MemoryStore(), peers=carrier)
    with pytest.raises(MisuseError, match="another"):
        Consumer(MemoryStore(), peers=carrier)


def test_publisher_and_consumer_over_a_real_swarm() -> None:
    pytest.importorskip("libtorrent")
    from thinwire.peers.torrent import Swarm

    store = FaultyStore(MemoryStore())
    torch.manual_seed(0)
    trained = {"w": torch.randn(400_000).bfloat16()}
    served = {"w": torch.zeros(400_000).bfloat16()}
    with (
        Publisher(store, peers=Swarm(listen="127.0.0.1:0")) as publisher,
        Consumer(store, peers=Swarm(listen="127.0.0.1:0", rescue_s=20.0)) as consumer,
    ):
        publisher.publish(trained)
        consumer.load(served)
        trained["w"][::3] *= 1.5
        publisher.publish(trained)
        version = consumer.poll()
        assert version is not None
        version.apply(served)
        assert torch.equal(served["w"], trained["w"])
        asked = {operation.key for operation in store.log if operation.verb in ("get", "get_range")}
        assert not any(key.endswith(("delta.safetensors", "model.safetensors")) for key in asked)
        swarmed = consumer._peered
        assert isinstance(swarmed, PeerStore)
        assert swarmed.peer_bytes > 800_000

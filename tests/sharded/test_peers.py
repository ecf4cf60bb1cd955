"""Ranks that give what they publish to peers: workers get every rank's objects without the store."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

from tests.sharded.fleet import State, empty_like, moved, same_bits, shards
from tests.sharded.test_chunking import Spec
from tests.sharded.threads import ranks, together
from thinwire.errors import MisuseError
from thinwire.peers import Carrier
from thinwire.peers.memory import MemoryPeers, Room
from thinwire.stores.encrypted import EncryptedStore
from thinwire.stores.memory import MemoryStore
from thinwire.sync.sharded_consumer import ShardedConsumer
from thinwire.sync.sharded_publisher import ShardedPublisher
from thinwire.testing.faults import FaultyStore
from thinwire.testing.peers import BadPeers

SPEC: Spec = {"a": ((600, 300), "rows"), "b": ((64, 40), "replicated"), "c": ((500, 300), "columns")}
SIZE = 3


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in SPEC.items()}


def published(publishers: list[ShardedPublisher], whole: State, step: int) -> None:
    together([
        partial(publisher.publish, shards(whole, SPEC, rank, SIZE), step=step)
        for rank, publisher in enumerate(publishers)
    ])  # fmt: skip


def publishers_of(store: Any, peers: list[Any]) -> list[ShardedPublisher]:
    """Made at the same time, as with peers they must be."""
    return together([
        partial(ShardedPublisher, store, group=rank, threads=1, retry_s=0.5, anchor_ratio=50.0, peers=one)
        for rank, one in zip(ranks(SIZE), peers, strict=True)
    ])  # fmt: skip


def objects_got(store: FaultyStore) -> Counter[str]:
    """Patches and anchors that the store itself gave."""
    whole = [done.key for done in store.log if done.verb in ("get", "get_range") and done.fault is None]
    return Counter(key for key in whole if key.endswith(".safetensors"))


@pytest.mark.parametrize("encrypted", [False, True])
def test_workers_get_every_ranks_objects_from_the_ranks(encrypted: bool) -> None:
    room, inner = Room(), MemoryStore()
    key = bytes(range(32))

    def seen(store: Any) -> Any:
        return EncryptedStore(store, [key]) if encrypted else store

    publishers = publishers_of(seen(inner), [MemoryPeers(room) for _ in range(SIZE)])
    states = [state(1)]
    published(publishers, states[0], 0)
    asked = FaultyStore(inner)
    mine = empty_like(shards(states[0], SPEC, 0, 1))
    with ShardedConsumer(seen(asked), threads=1, peers=MemoryPeers(room)) as consumer:
        consumer.load(mine)
        assert same_bits(mine, states[0])
        for step in (1, 2):
            states.append(moved(states[-1], step))
            published(publishers, states[-1], step)
            version = consumer.poll()
            assert version is not None
            version.apply(mine)
            assert same_bits(mine, states[-1])
    assert not objects_got(asked)
    together([publisher.close for publisher in publishers])
    late = empty_like(shards(states[0], SPEC, 0, 1))
    with ShardedConsumer(seen(asked), threads=1, peers=MemoryPeers(room)) as consumer:
        consumer.load(late)  # the ranks have left; the store has it all
    assert same_bits(late, states[-1])
    assert objects_got(asked)


def test_a_rank_whose_peers_fail_publishes_all_the_same() -> None:
    room, store = Room(), MemoryStore()
    peers: list[Carrier] = [MemoryPeers(room) for _ in range(SIZE)]
    failing = peers[1]

    def fail(*args: Any) -> None:
        raise OSError("planned")

    failing.offer = fail  # type: ignore[method-assign]
    publishers = publishers_of(store, list(peers))
    whole = state(3)
    published(publishers, whole, 0)
    mine = empty_like(shards(whole, SPEC, 0, 1))
    with ShardedConsumer(store, threads=1, peers=MemoryPeers(room)) as consumer:
        consumer.load(mine)
    assert same_bits(mine, whole)


@pytest.mark.parametrize(
    ("peers", "said"), [(BadPeers("lie"), "cannot share bad peers"), ("pigeons", "no peers by the name")]
)
def test_peers_that_ranks_cannot_share_are_refused(peers: Any, said: str) -> None:
    with pytest.raises(MisuseError, match=said):
        publishers_of(MemoryStore(), [peers] * SIZE)


def test_a_rank_that_cannot_join_fails_all_and_nobody_stays_with_the_peers() -> None:
    room = Room()
    joined = MemoryPeers(room)
    joined.join(MemoryStore(), publishing=False)
    peers = [MemoryPeers(room), MemoryPeers(room), joined]
    errors = []

    def make(rank: Any, one: Carrier) -> None:
        try:
            ShardedPublisher(MemoryStore(), group=rank, threads=1, peers=one)
        except MisuseError as error:
            errors.append(str(error))

    together([partial(make, rank, one) for rank, one in zip(ranks(SIZE), peers, strict=True)])
    assert len(errors) == SIZE
    assert sum("on rank 2" in error for error in errors) == SIZE - 1
    assert room.peers == [joined]


def test_a_swarm_of_ranks() -> None:
    torrent = pytest.importorskip("thinwire.peers.torrent")
    pytest.importorskip("libtorrent")
    store = MemoryStore()
    local = {"listen": "127.0.0.1:0"}
    publishers = publishers_of(store, [torrent.Swarm(**local) for _ in range(SIZE)])
    whole = state(5)
    published(publishers, whole, 0)
    asked = FaultyStore(store)
    mine = empty_like(shards(whole, SPEC, 0, 1))
    with ShardedConsumer(asked, threads=1, peers=torrent.Swarm(**local, rescue_s=30.0)) as consumer:
        consumer.load(mine)
    assert same_bits(mine, whole)
    assert not objects_got(asked)
    together([publisher.close for publisher in publishers])

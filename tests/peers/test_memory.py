"""Peers in memory keep the contract, and doctests show it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest

from tests.peers.running import run_threads
from thinwire.errors import MisuseError
from thinwire.peers import Carrier, open_peers
from thinwire.peers.memory import MemoryPeers, Room
from thinwire.stores.memory import MemoryStore
from thinwire.testing.peers import BadPeers, CarrierContract, JointContract


class TestContract(CarrierContract):
    def run(self, scenario: Callable[..., Any], *args: Any) -> list[Any]:
        room = Room()
        return run_threads([MemoryPeers(room) for _ in range(self.parties)], scenario, *args)


class TestJointContract(JointContract):
    @cached_property
    def room(self) -> Room:
        return Room()

    def carrier(self) -> MemoryPeers:
        return MemoryPeers(self.room)


def test_bytes_are_counted_at_both_ends() -> None:
    room, store = Room(), MemoryStore()
    carriers = [MemoryPeers(room) for _ in range(3)]
    for carrier in carriers:
        carrier.join(store, publishing=False)
    carriers[0].offer("objects/1/a", [b"ab", b"c"])
    for carrier in carriers[1:]:
        assert carrier.fetch("objects/1/a", size_max=3, stall_s=1, progress=lambda _: None) == b"abc"
    assert sum(c.sent_bytes for c in carriers) == sum(c.received_bytes for c in carriers) == 6


def test_peers_belong_to_one_run() -> None:
    carrier = MemoryPeers(Room())
    carrier.join(MemoryStore(), publishing=False)
    with pytest.raises(MisuseError, match="another"):
        carrier.join(MemoryStore(), publishing=False)


@pytest.mark.parametrize(
    "spec",
    ["", "torrent", "swarm://", "swarm://host", "swarm://host:0", "swarm://host:70000", "swarm://a b:1", "SWARM", 3],
)
def test_what_names_no_peers_is_misuse(spec: object) -> None:
    with pytest.raises(MisuseError, match="no peers by the name"):
        open_peers(spec)  # type: ignore[arg-type]


def test_bad_peers_are_carriers() -> None:
    assert isinstance(BadPeers("lie"), Carrier)
    assert isinstance(MemoryPeers(Room()), Carrier)

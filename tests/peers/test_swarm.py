"""The swarm: real libtorrent sessions over loopback, with peers that lie, stall and go away."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes
from urllib.request import urlopen

import pytest

from tests.peers.processes import Workers
from tests.peers.running import run_threads
from thinwire.errors import MisuseError, RetryError
from thinwire.peers.metainfo import DESCRIPTION_SUFFIX, Description, describe
from thinwire.peers.protocol import Blob
from thinwire.peers.rendezvous import HINT_KEY, Rendezvous
from thinwire.peers.torrent import Swarm
from thinwire.stores.memory import MemoryStore
from thinwire.testing.peers import CarrierContract, JointContract

lt = pytest.importorskip("libtorrent")
KEY = "objects/0000000001-0011aabb/delta.safetensors"
SIZE = 3_000_000
LOCAL = "127.0.0.1:0"


class Counting:
    """A store that counts what is read from it, and may be told to refuse writes."""

    def __init__(self, *, read_only: bool = False) -> None:
        self.inner, self.read_only = MemoryStore(), read_only
        self.whole: list[str] = []
        self.ranged_bytes = 0
        self.ranges_answered = True

    def get(self, key: str, *, size_max: int) -> bytes:
        self.whole.append(key)
        return self.inner.get(key, size_max=size_max)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if not self.ranges_answered:
            raise RetryError("planned: the store does not answer")
        data = self.inner.get_range(key, start, length)
        self.ranged_bytes += length
        return data

    def put(self, key: str, data: Blob) -> None:
        if self.read_only:
            raise MisuseError("no right to write")
        self.inner.put(key, data)


@contextmanager
def swarms(count: int, store: Counting, *, publisher: bool = True, **options: Any) -> Iterator[list[Swarm]]:
    """Workers of one run that meet at a rendezvous of the test's; the first one publishes."""
    with Rendezvous("127.0.0.1") as meeting:
        options = {"rendezvous": meeting.addresses[0], "listen": LOCAL, **options}
        made = [Swarm(**options) for _ in range(count)]
        for n, swarm in enumerate(made):
            swarm.join(store, publishing=publisher and n == 0)
        try:
            yield made
        finally:
            for swarm in made:
                swarm.leave()


class TestJointContract(JointContract):
    def carrier(self) -> Swarm:
        return Swarm(listen=LOCAL)


def got(swarm: Swarm, key: str = KEY, size_max: int = SIZE, stall_s: float = 8.0) -> bytes | None:
    return swarm.fetch(key, size_max=size_max, stall_s=stall_s, progress=lambda _: None)


def published(store: Counting, swarm: Swarm, data: bytes, key: str = KEY) -> None:
    store.put(key, [data])
    swarm.offer(key, [data])


class TestContract(CarrierContract):
    sizes = (100_000, (1 << 20) + 5)

    def run(self, scenario: Callable[..., Any], *args: Any) -> list[Any]:
        return run_threads([Swarm(listen=LOCAL) for _ in range(self.parties)], scenario, *args)


def make(rank: int, size: int) -> Swarm:
    return Swarm(listen=LOCAL)


@pytest.mark.slow
class TestBetweenProcesses(CarrierContract):
    sizes = (100_000, (4 << 20) + 5)
    patience_s = 30.0
    workers: Workers

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _workers(cls) -> Iterator[None]:
        started = cls.workers = Workers(4)
        yield
        started.close()

    def run(self, scenario: Callable[..., Any], *args: Any) -> list[Any]:
        return self.workers.play(make, scenario, *args)


def test_what_was_removed_from_the_folder_is_told_and_got_again(tmp_path: Path) -> None:
    store, data = Counting(), os.urandom(SIZE)
    with swarms(2, store) as (publisher, worker):
        worker._folder = tmp_path / "held"
        published(store, publisher, data)
        assert got(worker) == data
        for file in (tmp_path / "held").iterdir():
            file.unlink()
        with pytest.raises(RetryError, match="read back"):
            got(worker)
        assert got(worker) == data


def test_everybody_gets_it_and_the_store_gives_only_descriptions() -> None:
    store, data = Counting(), os.urandom(SIZE)
    with swarms(4, store) as (publisher, *workers):
        published(store, publisher, data)
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(got, workers)) == [data] * 3
        assert got(workers[0]) == data  # again, from what it holds
    assert store.ranged_bytes == 0
    assert set(store.whole) == {KEY + DESCRIPTION_SUFFIX}


def test_without_the_publisher_the_store_seeds_what_nobody_has() -> None:
    store, data = Counting(), os.urandom(SIZE)
    with swarms(4, store, rescue_s=0.5) as (publisher, *workers):
        published(store, publisher, data)
        publisher.leave()
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(got, workers)) == [data] * 3
        assert SIZE <= store.ranged_bytes < 3 * SIZE  # each alone would have read all of it
        assert sum(w.rescued_bytes for w in workers) == store.ranged_bytes


def test_a_worker_that_got_it_from_the_store_gives_it_on() -> None:
    store, data = Counting(), os.urandom(SIZE)
    with swarms(3, store, rescue_s=30.0) as (publisher, worker, late):
        published(store, publisher, data)
        publisher.leave()
        worker.offer(KEY, [data])
        assert got(late, stall_s=15.0) == data
    assert store.ranged_bytes == 0


def test_consumers_need_no_right_to_write() -> None:
    store, data = Counting(), os.urandom(SIZE)
    with swarms(2, store) as (publisher, worker):
        published(store, publisher, data)
        store.read_only = True
        assert got(worker) == data
        worker.offer("objects/0000000002-bb/delta.safetensors", [data])  # described by nobody: not given on


def test_the_publishers_own_rendezvous_is_found_by_a_hint_and_found_again() -> None:
    store = Counting()
    worker = Swarm(listen=LOCAL, rescue_s=60.0)
    worker.join(store, publishing=False)
    try:
        for n in range(2):  # a publisher that is started again has another rendezvous
            publisher = Swarm(listen=LOCAL)
            publisher.join(store, publishing=True)
            data, key = os.urandom(SIZE), f"objects/000000000{n}-aa/delta.safetensors"
            published(store, publisher, data, key)
            worker._meeting = (float("-inf"), worker._meeting[1])  # the hint is looked at every few seconds
            assert got(worker, key, stall_s=15.0) == data
            publisher.leave()
        assert HINT_KEY in store.whole
    finally:
        worker.leave()


# --- peers that lie, stall, send rubbish ------------------------------------------------------------------------------


def liar(folder: Path, description: Description, meeting: str) -> Any:
    """A libtorrent session that seeds other bytes than were described."""
    (folder / description.name).write_bytes(os.urandom(description.size))
    session = lt.session({"listen_interfaces": LOCAL, "enable_dht": False, "enable_lsd": False, "alert_mask": 0})
    params = lt.load_torrent_buffer(description.encode())
    params.save_path, params.trackers = str(folder), [f"http://{meeting}/announce"]
    params.flags = lt.torrent_flags.seed_mode
    return session, session.add_torrent(params)


def test_a_peer_that_lies_is_found_out_piece_by_piece(tmp_path: Path) -> None:
    store, data = Counting(), os.urandom(SIZE)
    with swarms(3, store, rescue_s=0.5) as (publisher, worker, other):
        described = describe(KEY, [data])
        assert worker._named is not None
        lying = liar(tmp_path, described, worker._named[0])
        published(store, publisher, data)
        assert got(worker) == data
        publisher.leave()
        assert got(other, stall_s=15.0) == data
        del lying


def test_where_all_peers_lie_the_store_is_read(tmp_path: Path) -> None:
    store, data = Counting(), os.urandom(SIZE)
    with swarms(2, store, rescue_s=0.5) as (publisher, worker):
        published(store, publisher, data)
        publisher.leave()
        assert worker._named is not None
        lying = liar(tmp_path, describe(KEY, [data]), worker._named[0])
        assert got(worker, stall_s=15.0) == data
        assert store.ranged_bytes >= SIZE - (64 << 10)
        del lying


@contextmanager
def dumb_peer(reply: bytes) -> Iterator[int]:
    """Takes connections, answers each with ``reply`` and nothing more. Its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    connection.sendall(reply)
                except OSError:
                    return
                held.append(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    "reply",
    [b"", bytes(range(256)) * 16, b"\x13BitTorrent protocol" + bytes(8) + bytes(40)],
    ids=["silence", "rubbish", "handshake"],
)
def test_peers_that_stall_or_send_rubbish_hold_nobody_up(reply: bytes) -> None:
    store, data = Counting(), os.urandom(SIZE)
    with swarms(2, store, rescue_s=0.5) as (publisher, worker), dumb_peer(reply) as port:
        published(store, publisher, data)
        publisher.leave()
        assert worker._named is not None
        infohash = hashlib.sha1(describe(KEY, [data]).info()).digest()
        announce(worker._named[0], infohash, port)
        began = time.monotonic()
        assert got(worker) == data
        assert time.monotonic() - began < 60
        assert store.ranged_bytes >= SIZE


def announce(meeting: str, infohash: bytes, port: int) -> bytes:
    query = f"info_hash={quote_from_bytes(infohash)}&peer_id={os.urandom(10).hex()}&port={port}"
    with urlopen(f"http://{meeting}/announce?{query}", timeout=10) as reply:
        return reply.read()


def test_when_nothing_comes_from_anywhere_it_is_given_up_in_time() -> None:
    store, data = Counting(), os.urandom(SIZE)
    with swarms(2, store, rescue_s=0.2) as (publisher, worker):
        published(store, publisher, data)
        publisher.leave()
        store.ranges_answered = False
        began = time.monotonic()
        with pytest.raises(RetryError, match="nothing of"):
            got(worker, stall_s=1.0)
        assert time.monotonic() - began < 30
        store.ranges_answered = True
        assert got(worker, stall_s=8.0) == data  # nothing is remembered against it


# --- descriptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "rubbish", "of another object", "larger", "of other bytes"])
def test_descriptions_that_do_not_fit(kind: str) -> None:
    store, data = Counting(), os.urandom(SIZE)
    store.put(KEY, [data])
    forged = {
        "none": None,
        "rubbish": os.urandom(3000),
        "of another object": describe(KEY + "x", [data]).encode(),
        "larger": describe(KEY, [data + b"x"]).encode(),
        "of other bytes": describe(KEY, [data[::-1]]).encode(),
    }[kind]
    if forged is not None:
        store.put(KEY + DESCRIPTION_SUFFIX, [forged])
    with swarms(2, store, publisher=False, rescue_s=0.2) as (worker, other):
        other.offer(KEY, [data])
        if kind == "of other bytes":  # the store's own bytes do not agree with it: given up
            with pytest.raises(RetryError):
                got(worker, stall_s=2.0)
        else:
            assert got(worker) is None


def test_what_is_distrusted_is_not_asked_for_again_and_leaves_the_disk(tmp_path: Path) -> None:
    store, data = Counting(), os.urandom(SIZE)
    with swarms(2, store) as (publisher, worker):
        worker._folder = tmp_path / "held"
        published(store, publisher, data)
        assert got(worker) == data
        worker.distrust(KEY)
        assert got(worker) is None
        worker.offer(KEY, [data])
        deadline = time.monotonic() + 20
        while list((tmp_path / "held").iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list((tmp_path / "held").iterdir()) == []


def test_what_is_beyond_the_limit_is_given_up_oldest_first(tmp_path: Path) -> None:
    store = Counting()
    with swarms(1, store, folder=tmp_path / "held", keep_bytes=350_000) as (publisher,):
        for n in range(5):
            published(store, publisher, os.urandom(100_000), f"objects/000000000{n}-aa/delta.safetensors")
        assert [key[17:18] for key in publisher._torrents] == ["2", "3", "4"] or len(publisher._torrents) == 3
    assert not (tmp_path / "nothing").exists()


def test_small_objects_and_skip_deltas_do_not_go_by_swarm() -> None:
    swarm = Swarm()
    assert not swarm.carries(KEY, 1000)
    assert swarm.carries(KEY, 1 << 20)
    assert not swarm.carries("skips/0000000004-0000000002/aa.safetensors", 1 << 20)
    assert not swarm.carries("objects/" + "k" * 500, 1 << 20)


def test_misuse() -> None:
    with pytest.raises(MisuseError, match="not an address"):
        Swarm(rendezvous="nowhere")
    with pytest.raises(MisuseError, match="above 0"):
        Swarm(keep_bytes=0)
    swarm = Swarm()
    swarm.join(MemoryStore(), publishing=False)
    with pytest.raises(MisuseError, match="another"):
        swarm.join(MemoryStore(), publishing=False)


def test_leaving_removes_what_it_wrote_into_a_folder_that_was_given(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with swarms(1, Counting(), folder=folder) as (publisher,):
        published(publisher._origin, publisher, os.urandom(100_000))  # type: ignore[arg-type]
        assert len(list(folder.iterdir())) == 2
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]


def test_leaving_removes_the_folder_of_its_own() -> None:
    store = Counting()
    with swarms(1, store) as (publisher,):
        published(store, publisher, os.urandom(100_000))
        folder = publisher._engine.folder
        assert folder is not None
        assert folder.exists()
        publisher.leave()
        assert not folder.exists()

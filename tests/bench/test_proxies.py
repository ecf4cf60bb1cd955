"""The proxies delay, lose, corrupt and cut what they are told to, and nothing else; the store over HTTP is a store."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from thinwire.bench.net.faults import FaultProxy, counts_of
from thinwire.bench.net.http_store import HttpServer, HttpStore
from thinwire.bench.net.proxy import TcpProxy
from thinwire.errors import MisuseError, StoreUnavailableError
from thinwire.stores.local import LocalStore
from thinwire.stores.memory import MemoryStore
from thinwire.testing.stores import StoreContract


class TestContract(StoreContract):
    large_bytes = 4 << 20
    race_rounds = 2

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[HttpStore]:
        with HttpServer(LocalStore(tmp_path / "served", fsync=False)) as server:
            yield HttpStore(server.endpoint)


class TestContractOfAPart(StoreContract):
    large_bytes = 1 << 20
    race_rounds = 1

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[HttpStore]:
        other = LocalStore(tmp_path / "served", fsync=False)
        other.put("elsewhere", [b"not of this part"])
        with HttpServer(other) as server:
            yield HttpStore(f"{server.endpoint}/a.part/")


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets, and ends when its client does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(connection: socket.socket) -> None:
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[:2]
        server.shutdown(socket.SHUT_RDWR)


def through(address: tuple[str, int], data: bytes) -> tuple[bytes, float]:
    """What comes back, and how long the first byte of it took."""
    with socket.create_connection(address, timeout=60) as connection:
        sender = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
        began = time.monotonic()
        sender.start()
        got, first_s = bytearray(), 0.0
        while part := connection.recv(1 << 16):
            first_s = first_s or time.monotonic() - began
            got += part
        sender.join(timeout=60)
        return bytes(got), first_s


def test_bytes_come_through_in_order_and_late(echo: tuple[str, int]) -> None:
    data = random.Random(0).randbytes(3 << 20)
    with TcpProxy(echo, delay_s=0.1) as proxy:
        got, first_s = through(proxy.address, data)
    assert got == data
    assert first_s >= 0.2  # there and back; not more than that is not asserted


def test_what_is_lost_comes_late_and_what_follows_waits(echo: tuple[str, int]) -> None:
    data = random.Random(1).randbytes(1 << 20)
    with TcpProxy(echo, loss=0.02, timeout_s=0.02, seed=3) as proxy:
        got, _ = through(proxy.address, data)
        assert isinstance(proxy, TcpProxy)
        assert proxy.lost > 5
    assert got == data


@pytest.mark.parametrize("wrong", [{"delay_s": -1}, {"loss": 1}, {"loss": -0.1}, {"timeout_s": -1}])
def test_misuse_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(MisuseError):
        TcpProxy(("127.0.0.1", 1), **wrong)  # type: ignore[arg-type]
    with pytest.raises(MisuseError):
        FaultProxy("http://127.0.0.1:1", share=2)


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MisuseError, match="cannot listen"):
        TcpProxy(("127.0.0.1", 1), port=taken.getsockname()[1]).__enter__()


def test_a_share_of_what_is_fetched_is_damaged_and_nothing_that_is_written() -> None:
    inner = MemoryStore()
    with HttpServer(inner) as server, FaultProxy(server.endpoint, share=0.2, seed=1) as proxy:
        assert isinstance(proxy, FaultProxy)
        store = HttpStore(proxy.endpoint)
        whole = bytes(range(256)) * 20
        for n in range(50):
            store.put(f"objects/{n}", [whole])
            assert inner.get(f"objects/{n}", size_max=1 << 20) == whole
        corrupted = cut = 0
        for _ in range(4):
            for n in range(50):
                try:
                    got = store.get(f"objects/{n}", size_max=1 << 20)
                except StoreUnavailableError:
                    cut += 1
                    continue
                different = [i for i in range(len(whole)) if got[i] != whole[i]]
                assert len(got) == len(whole)
                assert len(different) <= 1
                corrupted += len(different)
        counts = counts_of(proxy.endpoint)
    assert (counts["put"], counts["object"]) == (50, proxy.counts["object"])
    assert counts["corrupted"] == corrupted > 5
    assert counts["cut"] >= cut > 0  # a cut on a connection that was kept open is asked for again by the store itself
    assert counts["object"] == 200 + counts["cut"] - cut


def test_a_damaged_listing_is_an_error_of_the_store_or_names_other_keys() -> None:
    inner = MemoryStore()
    inner.put("manifests/1", [b"{}"])
    with HttpServer(inner) as server, FaultProxy(server.endpoint, share=1, seed=2) as proxy:
        store, seen = HttpStore(proxy.endpoint), Counter[str]()
        for _ in range(200):
            try:
                seen[",".join(info.key for info in store.list("manifests/"))] += 1
            except StoreUnavailableError as error:
                seen["no listing" if "no listing" in str(error) else "cut"] += 1
    assert seen["no listing"] > 0
    assert seen["cut"] > 0


def test_without_a_share_nothing_is_damaged_and_listings_are_counted() -> None:
    inner = MemoryStore()
    inner.put("manifests/1", [b"{}"])
    with HttpServer(inner) as server, FaultProxy(server.endpoint, share=0) as proxy:
        store = HttpStore(proxy.endpoint)
        for _ in range(20):
            assert store.get("manifests/1", size_max=2) == b"{}"
            assert [info.key for info in store.list("manifests/")] == ["manifests/1"]
        counts = counts_of(proxy.endpoint)
    assert (counts["manifest"], counts["list"], counts.get("cut"), counts.get("corrupted")) == (20, 20, None, None)


def test_both_run_as_processes(tmp_path: Path) -> None:
    LocalStore(tmp_path, fsync=False).put("a", [b"bytes"])
    started = []

    def run(*words: str) -> str:
        process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    try:
        served = run("thinwire.bench.net.http_store", str(tmp_path), "127.0.0.1", "0")
        proxied = run("thinwire.bench.net.faults", served, "0", "0.0", "1")
        assert HttpStore(proxied).get("a", size_max=5) == b"bytes"
        assert counts_of(proxied)["other"] == 1
    finally:
        for process in started:
            process.kill()
            process.communicate(timeout=30)

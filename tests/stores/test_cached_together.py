"""A cache that many threads and processes use at once: one request for all, and nobody is held up."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.stores.caching import KEY, counted
from thinwire.errors import (
    StoreUnavailableError,
)
from thinwire.stores.cached import CachedStore
from thinwire.stores.local import LocalStore
from thinwire.stores.protocol import Notify
from thinwire.testing.faults import Fault, FaultyStore


def test_threads_that_ask_at_once_make_one_request(tmp_path: Path) -> None:
    _, origin = counted(**{KEY: b"patch"})
    slow = FaultyStore(origin, latency_s=0.3)
    shared, got = CachedStore(slow, tmp_path), []
    stores = [shared] * 6 + [CachedStore(slow, tmp_path) for _ in range(6)]
    threads = [threading.Thread(target=lambda s=s: got.append(s.get(KEY, size_max=9))) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert got == [b"patch"] * 12
    assert origin.count("get") == 1


WORKER = """
import sys, time
from pathlib import Path
from thinwire.stores.cached import CachedStore, cached
from thinwire.stores.local import LocalStore
from thinwire.testing.faults import FaultyStore

root, how, index = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
origin = FaultyStore(LocalStore(root / "origin", fsync=False))

class Logged:  # every request of any process is a file
    url, create_is_atomic = origin.url, True
    def get(self, key, *, size_max):
        (root / "asked" / f"{key.replace('/', '-')} {index}").touch()
        if how == "hang":
            print("asking", flush=True)
            time.sleep(600)
        time.sleep(0.2)
        return origin.get(key, size_max=size_max)

store = CachedStore(Logged(), root / "cache", patience_s=float(sys.argv[4]))
while not (root / "go").exists():
    time.sleep(0.005)
for number in range(4):
    key = f"objects/{number}"
    assert store.get(key, size_max=1 << 20) == bytes([number]) * 1000, key
print("done")
"""


def start(root: Path, index: int, how: str = "work", patience_s: float = 60) -> subprocess.Popen[str]:
    for name in ("asked", "origin"):
        (root / name).mkdir(exist_ok=True)
    words = [sys.executable, "-c", WORKER, str(root), how, str(index), str(patience_s)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fill(root: Path) -> None:
    origin = LocalStore(root / "origin", fsync=False)
    for number in range(4):
        origin.put(f"objects/{number}", [bytes([number]) * 1000])


def ended(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "done\n"), err


def test_processes_that_ask_at_once_make_one_request_a_key(tmp_path: Path) -> None:
    fill(tmp_path)
    processes = [start(tmp_path, index) for index in range(4)]
    (tmp_path / "go").touch()
    ended(processes)
    asked = sorted(path.name.split()[0] for path in (tmp_path / "asked").iterdir())
    assert asked == [f"objects-{number}" for number in range(4)]


def test_a_worker_that_is_killed_while_it_asks_holds_nobody_up(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "go").touch()
    killed = start(tmp_path, 0, "hang")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "asking\n"
    waiting = start(tmp_path, 1)
    time.sleep(0.5)
    killed.kill()
    killed.wait(timeout=30)
    ended([waiting])
    asked = {path.name for path in (tmp_path / "asked").iterdir()}
    assert asked == {"objects-0 0", *(f"objects-{number} 1" for number in range(4))}


def test_a_worker_that_hangs_while_it_asks_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "go").touch()
    hanging = start(tmp_path, 0, "hang")
    try:
        assert hanging.stdout is not None
        assert hanging.stdout.readline() == "asking\n"
        ended([start(tmp_path, 1, patience_s=0.3)])
    finally:
        hanging.kill()
        hanging.communicate(timeout=30)


def test_an_error_is_everybodys_who_waited_and_nobodys_who_comes_later(tmp_path: Path) -> None:
    _, origin = counted(**{KEY: b"patch"})
    flaky = FaultyStore(origin, [Fault("get", 1, "unavailable")], latency_s=0.3)
    store, got = CachedStore(flaky, tmp_path), []

    def ask() -> None:
        try:
            got.append(store.get(KEY, size_max=9))
        except StoreUnavailableError as error:
            got.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert got == [f"planned: get of {KEY} not answered"] * 4
    assert store.get(KEY, size_max=9) == b"patch"


def test_those_who_wait_are_woken_by_the_first_who_gets_it(tmp_path: Path) -> None:
    inner, origin = counted()
    stores = [CachedStore(origin, tmp_path, fresh_s=0) for _ in range(3)]
    assert all(isinstance(store, Notify) for store in stores)
    assert not isinstance(origin, Notify)
    woken: list[bool] = []
    waiting = [
        threading.Thread(target=lambda s=s: woken.append(s.wait_for("manifests/2", timeout_s=60))) for s in stores
    ]
    for thread in waiting:
        thread.start()
    inner.put("manifests/2", [b"{}"])
    assert not stores[0].wait_for("manifests/2", timeout_s=0.05)  # nobody has asked
    assert stores[0].get("manifests/2", size_max=2) == b"{}"
    for thread in waiting:
        thread.join(timeout=60)
    assert woken == [True] * 3
    assert origin.count("get") == 1

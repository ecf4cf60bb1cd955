"""CachedStore keeps the contract of a store, asks the origin once, and is never worse than no cache at all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.errors import (
    DamagedObjectError,
    MisuseError,
    ObjectNotFoundError,
    RefetchError,
    StoreUnavailableError,
    ThinwireError,
)
from thinwire.stores.cached import CachedStore, cached
from thinwire.stores.encrypted import EncryptedStore
from thinwire.stores.local import LocalStore
from thinwire.stores.memory import MemoryStore
from thinwire.stores.protocol import Distrust, Notify, Store
from thinwire.testing.faults import Fault, FaultyStore
from thinwire.testing.stores import StoreContract

KEY = "objects/0000000001-abc/delta.safetensors"


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


def counted(**keys: bytes) -> tuple[MemoryStore, FaultyStore]:
    inner = MemoryStore()
    for key, data in keys.items():
        inner.put(key, [data])
    return inner, FaultyStore(inner)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "v1" / "entries").rglob("*") if path.is_file())


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


# --- many at once --------------------------------------------------------------------------------------------------


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


# --- room ----------------------------------------------------------------------------------------------------------


def test_what_was_used_last_stays_and_the_limit_is_kept(tmp_path: Path) -> None:
    _, origin = counted(**{f"objects/{n}": bytes([n]) * 1000 for n in range(40)})
    store = CachedStore(origin, tmp_path, bytes_max=12_000)
    for n in range(40):
        store.get(f"objects/{n}", size_max=1000)
        for path in files(tmp_path):  # as if it had been a minute ago
            facts = path.stat()
            os.utime(path, (facts.st_atime, facts.st_mtime - 60))
        assert store.get("objects/0", size_max=1000) == bytes(1000)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 12_000 * 17 // 16 + 1100
    before = origin.count("get")
    store.get("objects/0", size_max=1000)
    assert origin.count("get") == before == 40
    store.get("objects/1", size_max=1000)
    assert origin.count("get") == before + 1


def test_an_object_that_is_too_large_to_keep_is_got_all_the_same(tmp_path: Path) -> None:
    _, origin = counted(**{KEY: bytes(1000)})
    store = CachedStore(origin, tmp_path, bytes_max=1500)
    for times in (1, 2):
        assert store.get(KEY, size_max=1000) == bytes(1000)
        assert origin.count("get") == times
    with pytest.raises(DamagedObjectError):
        store.get(KEY, size_max=999)


def test_a_reader_keeps_what_is_evicted_meanwhile(tmp_path: Path) -> None:
    """One reads, and another writes so much that entries go all the time."""
    size = 200_000
    _, origin = counted(**{f"objects/{n}": bytes([n]) * size for n in range(8)})
    done, wrong = threading.Event(), []

    def churn() -> None:
        store = CachedStore(origin, tmp_path, bytes_max=3 * size)
        for k in range(60):
            store.get(f"objects/{k % 8}", size_max=size)
        done.set()

    def read() -> None:
        store = CachedStore(origin, tmp_path, bytes_max=3 * size)
        while not done.is_set():
            for n in range(8):
                if store.get(f"objects/{n}", size_max=size) != bytes([n]) * size:
                    wrong.append(n)

    threads = [threading.Thread(target=target) for target in (churn, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert done.is_set()
    assert wrong == []


LIMITED = """
import resource, sys
from thinwire.stores.cached import CachedStore, cached
from thinwire.stores.local import LocalStore
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store = CachedStore(LocalStore(sys.argv[1]), sys.argv[2])
for _ in range(2):
    assert store.get("objects/large", size_max=1 << 20) == bytes(100_000)
    assert store.get("objects/small", size_max=1 << 20) == b"small"
print("done")
"""


def test_a_disk_without_room_is_as_no_cache(tmp_path: Path) -> None:
    origin = LocalStore(tmp_path / "origin", fsync=False)
    origin.put("objects/large", [bytes(100_000)])
    origin.put("objects/small", [b"small"])
    words = [sys.executable, "-c", LIMITED, str(tmp_path / "origin"), str(tmp_path / "cache")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr.count("cannot be written") == 1
    assert not list((tmp_path / "cache").rglob("tmp/*"))


def test_a_folder_that_is_none_is_as_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    _, origin = counted(**{KEY: b"patch"})
    store = CachedStore(origin, tmp_path / "file")
    for _ in range(3):
        assert store.get(KEY, size_max=9) == b"patch"
        store.put("a", [b"x"])
        store.distrust(KEY)
        assert [info.key for info in store.list("a")] == ["a"]
    assert "cannot be written" in caplog.text


READ_ONLY = """
import os, sys
from thinwire.stores.cached import CachedStore, cached
from thinwire.stores.local import LocalStore
if os.getuid() == 0:
    os.setuid(65534)
store = CachedStore(LocalStore(sys.argv[1]), sys.argv[2])
assert store.get("objects/kept", size_max=9) == b"kept"
assert store.get("objects/new", size_max=9) == b"new"
print("done")
"""


def test_a_folder_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # which anybody may enter, unlike pytest's
        root = Path(name)
        root.chmod(0o755)
        origin = LocalStore(root / "origin", fsync=False)
        origin.put("objects/kept", [b"kept"])
        origin.put("objects/new", [b"new"])
        CachedStore(origin, root / "cache").get("objects/kept", size_max=9)
        origin.delete("objects/kept")  # so that it can only come from the cache
        for path in sorted((root / "cache").rglob("*"), reverse=True):
            path.chmod(0o555 if path.is_dir() else 0o444)
        words = [sys.executable, "-c", READ_ONLY, str(root / "origin"), str(root / "cache")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        for path in (root / "cache").rglob("*"):
            path.chmod(0o755)
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_what_killed_writers_left_is_cleared_away(tmp_path: Path) -> None:
    _, origin = counted(**{KEY: b"patch", "objects/2": b"2"})
    CachedStore(origin, tmp_path).get(KEY, size_max=9)
    old = time.time() - 8 * 86400
    for name in ("tmp", "locks"):
        (tmp_path / "v1" / name).mkdir(exist_ok=True)
        for age, leftover in ((old, "old"), (time.time(), "new")):
            (tmp_path / "v1" / name / leftover).write_bytes(b"x")
            os.utime(tmp_path / "v1" / name / leftover, (age, age))
    (entry,) = files(tmp_path)
    os.utime(entry, (old, old))  # and an entry that nobody has used for a week
    CachedStore(origin, tmp_path).get("objects/2", size_max=9)
    for name in ("tmp", "locks"):
        assert [path.name for path in (tmp_path / "v1" / name).iterdir()] == ["new"]
    assert entry not in files(tmp_path)


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

"""A cache without room: what stays, what goes, disks that are full, folders that are none, what dead writers left."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.stores.caching import KEY, counted, files
from thinwire.errors import (
    DamagedObjectError,
)
from thinwire.stores.cached import CachedStore
from thinwire.stores.local import LocalStore


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

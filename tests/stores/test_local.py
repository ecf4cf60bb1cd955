"""LocalStore keeps the contract, leaves nothing half-written, and does not leave its folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from thinwire.errors import MisuseError, ObjectExistsError, ObjectNotFoundError, StoreUnavailableError, UnsafeStoreError
from thinwire.stores import enforces_create, open_store
from thinwire.stores.local import LocalStore
from thinwire.testing.stores import StoreContract


class TestContract(StoreContract):
    race_rounds = 20

    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path / "not" / "yet" / "there")


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


class TestContractWithoutHardLinks(StoreContract):
    """As on FAT: the rename that does not replace takes over."""

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
        monkeypatch.setattr(os, "link", no_links)
        return LocalStore(tmp_path, fsync=False)


def test_a_file_system_with_neither_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    store = LocalStore(tmp_path)
    with pytest.raises(UnsafeStoreError, match="another file system"):
        store.create("a", [b"x"])
    assert not enforces_create(store)
    assert list(store.list("")) == []


def test_a_link_whose_reply_was_lost_is_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_link = os.link

    def link_twice(source: str, target: str) -> None:  # what an NFS client does when the first reply is lost
        real_link(source, target)
        real_link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    LocalStore(tmp_path).create("a", [b"x"])
    assert LocalStore(tmp_path).get("a", size_max=1) == b"x"


# --- crashes ---------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from thinwire.stores.local import LocalStore
store = LocalStore(sys.argv[1], fsync=False)
print("writing", flush=True)
n = 0
while True:
    body = bytes([n % 256]) * 3_000_000
    store.put("replaced", [body])
    store.create(f"created/{n:06d}", [body])
    n += 1
"""


def test_a_killed_writer_leaves_nothing_half_written(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for round_number in range(4):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            wanted = round_number * 3 + 2  # killed at another moment each round, but not before it wrote something
            deadline = threading.Event()
            while sum(1 for _ in store.list("created/")) < wanted and not deadline.wait(0.001):
                assert writer.poll() is None
            os.kill(writer.pid, signal.SIGKILL)
        for info in store.list(""):
            body = store.get(info.key, size_max=3_000_000)
            assert len(body) == 3_000_000, info.key
            assert body == body[:1] * 3_000_000, info.key
        for info in list(store.list("created/")):
            store.delete(info.key)


def test_leftovers_are_not_listed_and_go_after_a_day(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", [b"x"])
    old, young = tmp_path / "~tmp" / "old", tmp_path / "~tmp" / "young"
    for leftover in (old, young):
        leftover.write_bytes(b"half")
    two_days_ago = os.stat(young).st_mtime - 2 * 86400
    os.utime(old, (two_days_ago, two_days_ago))
    assert [info.key for info in store.list("")] == ["a"]
    LocalStore(tmp_path).put("b", [b"y"])
    assert sorted(os.listdir(tmp_path / "~tmp")) == ["young"]


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create("a", [b"x"])
    with pytest.raises(ObjectExistsError):
        store.create("a", [b"y"])
    with pytest.raises(MisuseError):
        store.put("a/b", [b"below an object"])
    assert os.listdir(tmp_path / "~tmp") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE])
def test_a_full_or_failing_disk_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = LocalStore(tmp_path)
    store.put("a", [b"first"])

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    for write in (store.put, store.create):
        with pytest.raises(StoreUnavailableError, match=os.strerror(number)):
            write("a" if write == store.put else "b", [b"second"])
    monkeypatch.undo()
    assert store.get("a", size_max=10) == b"first"
    assert [info.key for info in store.list("")] == ["a"]


# --- names and links -------------------------------------------------------------------------------------------------


def test_links_below_the_root_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    root = tmp_path / "store"
    store = LocalStore(root)
    store.put("a", [b"x"])
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to(outside / "new")
    for key in ("folder/secret", "file", "loop", "loop/x", "dangling"):
        for call in (
            lambda: store.get(key, size_max=100),  # noqa: B023
            lambda: store.put(key, [b"y"]),  # noqa: B023
            lambda: store.create(key, [b"y"]),  # noqa: B023
            lambda: store.delete(key),  # noqa: B023
            lambda: store.head(key),  # noqa: B023
        ):
            with pytest.raises(MisuseError, match=r"symbolic link"):
                call()
    assert [info.key for info in store.list("")] == ["a"]
    assert os.listdir(outside) == ["secret"]


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    LocalStore(tmp_path / "link").put("a", [b"x"])
    assert LocalStore(tmp_path / "real").get("a", size_max=1) == b"x"


def test_a_named_pipe_is_no_object_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    store = LocalStore(tmp_path)
    with pytest.raises(ObjectNotFoundError):
        store.get("pipe", size_max=1)
    assert list(store.list("")) == []


def test_foreign_files_are_not_listed(tmp_path: Path) -> None:
    for name in ("my notes.txt", "~backup", "a+b"):
        (tmp_path / name).write_text("x")
    (tmp_path / "sub folder").mkdir()
    (tmp_path / "sub folder" / "a").write_text("x")
    LocalStore(tmp_path).put("a", [b"x"])
    assert [info.key for info in LocalStore(tmp_path).list("")] == ["a"]


def test_an_object_and_a_folder_cannot_have_one_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", [b"x"])
    for write in (store.put, store.create):
        with pytest.raises(MisuseError):
            write("a", [b"y"])
        with pytest.raises(MisuseError):
            write("a/b/c", [b"y"])
    assert store.get("a/b", size_max=1) == b"x"


def test_a_name_longer_than_the_file_system_takes_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(MisuseError):
        LocalStore(tmp_path).put("k" * 400, [b"x"])


def test_objects_get_the_usual_permissions(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        LocalStore(tmp_path).put("a", [b"x"])
    finally:
        os.umask(previous)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_opening_makes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new")
    assert list(store.list("")) == []
    store.delete("a")
    with pytest.raises(ObjectNotFoundError):
        store.head("a")
    assert os.listdir(tmp_path) == []

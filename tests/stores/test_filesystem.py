"""FsspecStore keeps the contract on two file systems, but for the promise that create is atomic, and says so."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

import pytest

from thinwire.errors import MisuseError, StoreUnavailableError
from thinwire.stores import enforces_create, open_store
from thinwire.stores.filesystem import FsspecStore
from thinwire.testing.stores import StoreContract


class TestContractInMemory(StoreContract):
    create_is_atomic = False

    @pytest.fixture
    def store(self) -> FsspecStore:
        return FsspecStore(f"memory://{uuid.uuid4().hex}/nested")


class TestContractOnLocalFiles(StoreContract):
    create_is_atomic = False

    @pytest.fixture
    def store(self, tmp_path: Path) -> FsspecStore:
        return FsspecStore(f"local://{tmp_path}/nested")


def test_unknown_schemes_go_to_fsspec_which_may_not_know_them() -> None:
    store = open_store("local:///tmp/never-made")
    assert isinstance(store, FsspecStore)
    assert not enforces_create(store)
    with pytest.raises(MisuseError, match=r"no store for 'nowhere://'.*s3://"):
        open_store("nowhere://bucket")


def test_a_protocol_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install paramiko to use ssh")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MisuseError, match="paramiko"):
        open_store("ssh://host/folder")


def test_credentials_are_not_in_the_url_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_, **__: (object(), "/folder"))
    assert FsspecStore("ssh://me:secret@host:22/folder").url == "ssh://host:22/folder"


def test_an_adapter_that_hangs_is_given_up(tmp_path: Path) -> None:
    store = FsspecStore(f"local://{tmp_path}", timeout_s=0.05, skip_instance_cache=True)
    release = threading.Event()
    store._files.info = lambda _: release.wait(60)
    try:
        with pytest.raises(StoreUnavailableError, match="no answer within"):
            store.head("a")
    finally:
        release.set()


@pytest.mark.parametrize("error", [OSError("reset"), RuntimeError("from a library"), TimeoutError()])
def test_whatever_an_adapter_raises_is_wrapped(tmp_path: Path, error: Exception) -> None:
    store = FsspecStore(f"local://{tmp_path}", skip_instance_cache=True)

    def fail(*_: object) -> None:
        raise error

    store._files.info = fail
    with pytest.raises(StoreUnavailableError) as caught:
        store.get("a", size_max=1)
    assert caught.value.__cause__ is error


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    store = FsspecStore(f"local://{tmp_path}", skip_instance_cache=True)

    def fail(*_: object) -> None:
        raise OSError("no rename")

    store._files.mv = fail
    with pytest.raises(StoreUnavailableError):
        store.put("a", [b"x"])
    assert list((tmp_path / "~tmp").iterdir()) == []

"""open_store chooses by URL, says what it knows, and imports nothing early."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import thinwire.stores
from thinwire.errors import MisuseError
from thinwire.stores import open_store
from thinwire.stores.cloud import CloudStore
from thinwire.stores.local import LocalStore
from thinwire.stores.memory import MemoryStore


@pytest.mark.parametrize(
    ("url", "kind", "shown"),
    [
        ("memory://", MemoryStore, "memory://"),
        ("memory://name", MemoryStore, "memory://name"),
        ("/absolute/path", LocalStore, "file:///absolute/path"),
        ("file:///absolute/path", LocalStore, "file:///absolute/path"),
        ("file://localhost/with%20space", LocalStore, "file:///with%20space"),
        ("s3://bucket", CloudStore, "s3://bucket"),
        ("s3://bucket/a/b/", CloudStore, "s3://bucket/a/b"),
        ("gs://bucket/a", CloudStore, "gs://bucket/a"),
    ],
)
def test_which_store_a_url_opens(url: str, kind: type, shown: str) -> None:
    store = open_store(url)
    assert isinstance(store, kind)
    assert store.url == shown


def test_azure_takes_its_account_as_an_option() -> None:
    assert open_store("az://container/a", account_name="me", account_key="a2V5").url == "az://container/a"


def test_relative_paths_and_path_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative, absolute = open_store("some/folder"), open_store(tmp_path / "some" / "folder")
    os.makedirs(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")  # a relative path means the folder it meant when it was opened
    assert relative.url == absolute.url == (tmp_path / "some" / "folder").as_uri()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "empty"),
        ("file://host/path", "host"),
        ("file://relative/path", "host"),
        ("file:///a?b", "query"),
        ("s3://", "bucket"),
        ("s3:///key", "bucket"),
        ("s3://key:secret@bucket/x", "bucket/x"),
        ("s3://bucket/x?endpoint=http://h", "bucket/x"),
        ("az://container/x", "Account must be specified"),
        ("nowhere://x", "memory://name"),
        ("memory://a name", "key"),
    ],
)
def test_urls_that_are_refused(url: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(MisuseError, match=says) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("memory://", {"endpoint": "x"}),
        ("/path", {"sync": True}),
        ("s3://bucket", {"endpointt": "http://h"}),
        ("s3://bucket", {"part_bytes": 100}),
        ("s3://bucket", {"stall_timeout_s": 0}),
        ("s3://bucket", {"retries": -1}),
    ],
)
def test_unknown_or_senseless_options_are_refused(url: str, options: dict[str, object]) -> None:
    with pytest.raises(MisuseError):
        open_store(url, **options)


def test_the_public_surface() -> None:
    assert thinwire.stores.__all__ == sorted(thinwire.stores.__all__)
    assert set(thinwire.stores.__all__) == {
        "Blob", "Create", "Delete", "Distrust", "Get", "GetRange", "Head", "List", "Notify", "ObjectInfo", "Put",
        "Store", "check_key", "enforces_create", "open_store",
    }  # fmt: skip


def test_importing_the_stores_is_inert() -> None:
    script = (
        "import sys, threading; before = set(sys.modules); import thinwire.stores;"
        "heavy = {'obstore', 'fsspec', 'torch', 'numpy', 'asyncio', 'thinwire.wire', 'thinwire.testing'};"
        "assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules);"
        "assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

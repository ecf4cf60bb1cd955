"""``--cache``: what one follower of a machine has fetched, the others take from the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.tools import series, thinwire
from tests.sync.checkpoints import load, same
from thinwire.stores.encrypted import object_key_text

pytest.importorskip("cryptography")


@pytest.mark.parametrize("sealed", [False, True])
def test_the_second_folder_comes_from_the_cache(tmp_path: Path, sealed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if sealed:
        (tmp_path / "object.key").write_text(object_key_text(os.urandom(32)))
        (tmp_path / "object.key").chmod(0o600)
        monkeypatch.setenv("THINWIRE_OBJECT_KEY", str(tmp_path / "object.key"))
    files, states = series(tmp_path / "states", 3)
    for file in files:
        thinwire("publish", "store", file)
    thinwire("follow", "store", "-o", "one", "--once", "--cache", "cache")
    for path in Path("store/objects").rglob("*"):
        if path.is_file():
            path.unlink()  # from now on there is only the cache
    monkeypatch.setenv("THINWIRE_CACHE", "cache")
    thinwire("pull", "store", "-o", "two")
    assert same(load(Path("two/model.safetensors")), states[-1])
    kept = [path for path in Path("cache").rglob("*") if path.is_file()]
    assert kept
    assert sealed != any(b"thinwire.version" in path.read_bytes() for path in kept)

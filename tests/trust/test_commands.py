"""Keys on the command line: made once, pinned, rotated; what verify says of signatures and skip deltas."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.tools import series, thinwire
from thinwire.crypto import SigningKey
from thinwire.wire.manifest import Manifest, manifest_key
from thinwire.wire.signing import sign
from thinwire.wire.skip import Skip


@pytest.fixture(autouse=True)
def keys(tmp_path: Path) -> None:
    for name in ("a", "b", "root"):
        thinwire("keygen", f"{name}.key")


def test_keys_are_never_overwritten_and_private_ones_are_private(tmp_path: Path) -> None:
    assert Path("a.key").stat().st_mode & 0o777 == 0o600
    before = Path("a.key").read_bytes()
    assert "never overwritten" in thinwire("keygen", "a.key", code=2).err
    Path("c.key.pub").write_text("mine")
    thinwire("keygen", "c.key", code=2)
    assert Path("a.key").read_bytes() == before
    assert not Path("c.key").exists()
    made = thinwire("keygen", "d.key", "--json").json
    assert made["key_id"] == thinwire("trust", "create", "--root", "d.key.pub", "--publisher", "d.key.pub", "--key",
                                      "d.key", "-o", "d.json", "--json").json["signed_by"][0]  # fmt: skip
    thinwire("keygen", "objects.key", "--objects")
    assert Path("objects.key").stat().st_mode & 0o777 == 0o600


def test_publish_and_follow_with_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = series(tmp_path, 4)
    thinwire("publish", "run", files[0], "--key", "a.key")
    thinwire("publish", "run", files[1], "--key", "a.key")
    assert thinwire("follow", "run", "-o", "m", "--once", "--trust", "a.key.pub", "--max-age", "1h", "--json").json
    assert Path("m/.thinwire.seen.json").exists()
    assert "adopt=" in thinwire("publish", "run", files[2], "--key", "b.key", code=3).err
    assert "unknown" in thinwire("pull", "run", "-o", "n", "--trust", "b.key.pub", code=3).err
    assert not Path("n/model.safetensors").exists()
    shutil.copytree("run", "old")
    monkeypatch.setenv("THINWIRE_KEY", "a.key")
    monkeypatch.setenv("THINWIRE_TRUST", "a.key.pub:b.key.pub")
    thinwire("publish", "run", files[2])
    thinwire("follow", "run", "-o", "m", "--once")
    Path("m/model.safetensors").unlink()
    assert "rollback" in thinwire("follow", "old", "-o", "m", "--once", code=3).err
    thinwire("trust", "heartbeat", "run")
    assert Path("run/heartbeat.json").exists()
    for command in (["log", "run"], ["verify", "run"], ["gc", "run", "--dry-run"], ["compact", "run", "--dry-run"]):
        thinwire(*command)
    monkeypatch.setenv("THINWIRE_TRUST", "root.key.pub")
    for command in (["log", "run"], ["verify", "run"], ["gc", "run"], ["compact", "run"]):
        thinwire(*command, code=3)
    monkeypatch.delenv("THINWIRE_TRUST")
    assert "needs --trust" in thinwire("pull", "run", "-o", "m", "--max-age", "1h", code=2).err


def test_a_rotation_on_the_command_line(tmp_path: Path) -> None:
    files, _ = series(tmp_path, 4)
    new = ("trust", "create", "--root", "root.key.pub", "--publisher", "a.key.pub", "--key", "root.key")
    thinwire(*new, "-o", "trust.json", "--store", "run", "--chain", "run-7", "--expires", "365d")
    assert "run-7" in thinwire("trust", "show", "trust.json").out
    thinwire("publish", "run", files[0], "--key", "a.key", "--trust", "trust.json")
    thinwire("follow", "run", "-o", "m", "--once", "--trust", "trust.json")
    turn = ("trust", "rotate", "trust.json", "--root", "root.key.pub", "--key", "root.key", "--store", "run")
    thinwire(*turn, "--publisher", "a.key.pub", "--publisher", "b.key.pub", "-o", "trust-2.json")
    thinwire(*turn, "--publisher", "b.key.pub", "-o", "trust-2b.json", code=3)  # another version 2 is there
    thinwire("publish", "run", files[1], "--key", "b.key", "--trust", "trust.json")
    last = ("trust", "rotate", "trust-2.json", *turn[3:], "--publisher", "b.key.pub", "-o", "trust-3.json")
    thinwire(*last)
    thinwire("publish", "run", files[2], "--key", "a.key", "--trust", "trust.json", code=3)
    thinwire("publish", "run", files[2], "--key", "b.key", "--trust", "trust.json")
    thinwire("follow", "run", "-o", "m", "--once", "--trust", "trust.json")
    assert "all is well" in thinwire("verify", "run", "--deep", "--trust", "trust.json").out
    assert "made by: thinwire trust create" in thinwire("trust", "rotate", "a.key.pub", "-o", "x", code=2).err
    assert "is there already" in thinwire(*last, code=2).err
    shutil.copy("trust-3.json", "run/trust/0000000005.json")
    problems = thinwire("verify", "run", "--trust", "trust.json", "--json", code=3).json["problems"]
    assert [p["where"] for p in problems] == ["trust/0000000005.json"]


def test_verify_looks_at_signatures_and_at_skip_deltas(tmp_path: Path) -> None:
    files, _ = series(tmp_path, 5)
    for file in files:
        thinwire("publish", "run", file, "--key", "a.key", "--anchor-ratio", "9")
    thinwire("compact", "run", "--key", "a.key")
    record = next(Path("run/skips").glob("*.json"))
    skip = Skip.parse(record.read_bytes())
    check = ("verify", "run", "--trust", "a.key.pub", "--json")
    seen = thinwire(*check, "--deep").json
    assert (seen["ok"], seen["signed"]) == (True, True)
    assert seen["skips"] >= 1

    def wheres(*more: str, code: int) -> list[str]:
        return [p["where"] for p in thinwire(*check, *more, code=code).json["problems"]]

    other = SigningKey.load("b.key")
    good = record.read_bytes()
    record.write_bytes(replace(skip, signatures=sign(skip.signed(), [other])).encode())
    assert wheres(code=3) == [f"skips/{record.name}"]
    record.write_bytes(replace(skip, state="ab" * 32).encode())
    assert wheres(code=3) == [f"skips/{record.name}"]
    elsewhere = replace(skip, signatures=(), object=replace(skip.object, size=skip.object.size + 1))
    record.write_bytes(elsewhere.encode())
    assert wheres(code=5) == [skip.object.key]
    delta = Path("run") / Manifest.parse((Path("run") / manifest_key(2)).read_bytes()).deltas[0].object.key
    from thinwire.sync.remote import hash_bytes

    patch = Path("run") / skip.object.key
    kept, data = patch.read_bytes(), delta.read_bytes()
    patch.write_bytes(data)
    lying = replace(skip.object, size=len(data), digest=hash_bytes("blake3", [data]))
    record.write_bytes(replace(skip, signatures=(), object=lying).encode())
    assert wheres(code=0) == []  # whole, and signed by nobody: it proves nothing
    assert wheres("--deep", code=5) == [skip.object.key]
    record.write_bytes(good)
    patch.unlink()
    assert wheres(code=5) == [skip.object.key]
    patch.write_bytes(kept)
    newest = Path("run") / manifest_key(5)
    newest.write_bytes(replace(Manifest.parse(newest.read_bytes()), signatures=()).encode())
    assert manifest_key(5) in wheres(code=3)


def test_objects_are_encrypted_where_a_key_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = series(tmp_path, 2)
    thinwire("keygen", "objects.key", "--objects")
    monkeypatch.setenv("THINWIRE_OBJECT_KEY", "objects.key")
    thinwire("publish", "run", files[0])
    thinwire("publish", "run", files[1])
    thinwire("pull", "run", "-o", "m")
    assert "all is well" in thinwire("verify", "run", "--deep").out
    thinwire("compact", "run")
    assert b"thinwire.manifest" not in (Path("run") / manifest_key(1)).read_bytes()
    thinwire("keygen", "new.key", "--objects")
    monkeypatch.setenv("THINWIRE_OBJECT_KEY", "new.key")
    thinwire("pull", "run", "-o", "n", code=3)
    monkeypatch.setenv("THINWIRE_OBJECT_KEY", "new.key:objects.key")
    thinwire("pull", "run", "-o", "n")
    monkeypatch.delenv("THINWIRE_OBJECT_KEY")
    thinwire("pull", "run", "-o", "o", code=3)

"""publish, log, verify, gc and inspect on stores: what is damaged is listed, one by one, and decides the exit code."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cli.tools import series, thinwire
from tests.sync.checkpoints import lively, load, same, save, save_sharded, state
from thinwire import Consumer
from thinwire.sync.checkpoint import open_checkpoint, tree_of_checkpoint
from thinwire.tensors.bits import tensor_of
from thinwire.wire.manifest import Manifest, Parent, manifest_key


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A store of seven versions with anchors at 1, 4 and 7, and what was published. Not to be changed."""
    folder = tmp_path_factory.mktemp("published")
    paths, _ = series(folder, 7)
    for step, path in enumerate(paths):
        thinwire("publish", folder / "store", path, "--step", step * 10, "--anchor-every", 3)
    return folder / "store", paths


@pytest.fixture
def store(published: tuple[Path, list[Path]], tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(published[0], tmp_path / "store"))


def object_of(store: Path, version: int, name: str) -> Path:
    return next(store.glob(f"objects/{version:010d}-*/{name}"))


def flip(path: Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- publish and log -----------------------------------------------------------------------------------------------


def test_what_is_published_is_what_consumers_get(published: tuple[Path, list[Path]]) -> None:
    store, paths = published
    for version, path in enumerate(paths, 1):
        held = Consumer(str(store)).fetch(version=version)
        assert held.digest == tree_of_checkpoint(open_checkpoint(path)).digest
        tensors = {n: tensor_of(held.cells[n], x.dtype.name, x.shape) for n, x in held.layouts.items()}
        assert same(tensors, load(path))


def test_publish_reports_and_keeps_metadata(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "m", state())
    args = ("publish", "s", folder, "--meta", "run=7", "--meta", "note=a=b", "--dtype", "bf16", "--level", "smallest")
    first = thinwire(*args, "--json").json
    assert (first["version"], first["kind"], first["step"]) == (1, "anchor", None)
    again = thinwire(*args, "--step", 5)
    assert again.out.startswith("version 2 (step 5): delta, ")
    entry = thinwire("log", "s", "--json").json["versions"][0]
    assert (entry["metadata"], entry["changed"], entry["step"]) == ({"run": "7", "note": "a=b"}, 0, 5)
    held = Consumer("s").fetch()
    assert {x.dtype.name for n, x in held.layouts.items() if n in ("b.weight", "j.double")} == {"BF16"}
    assert "KEY=VALUE" in thinwire("publish", "s", folder, "--meta", "x", code=2).err
    assert "hash=" in thinwire("publish", "s", folder, "--hash", "sha256", code=2).err


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    path = save(tmp_path / "m", state(), {"thinwire.aliases": json.dumps({"a.head": "k.weight"})})
    thinwire("publish", "s", path)
    held = Consumer("s").fetch()
    assert held.aliases == {"k.weight": "a.head"}  # whichever name sorts first is the tensor's
    thinwire("pull", "s", "-o", "d")
    assert open_checkpoint("d/model.safetensors").aliases == held.aliases


def test_log(published: tuple[Path, list[Path]]) -> None:
    store, paths = published
    seen = thinwire("log", store, "--json").json
    assert [v["version"] for v in seen["versions"]] == [7, 6, 5, 4, 3, 2, 1]
    assert [v["step"] for v in seen["versions"]] == [60, 50, 40, 30, 20, 10, 0]
    assert [v["kind"] for v in seen["versions"]][::3] == ["delta+anchor", "delta+anchor", "anchor"]
    newest = seen["versions"][0]
    assert newest["state"] == tree_of_checkpoint(open_checkpoint(paths[-1])).digest
    assert 0 <= newest["age_s"] < 300
    assert 0.01 < newest["density"] < 0.03
    short = thinwire("log", store, "--limit", 2)
    assert newest["state"][:12] in short.out
    assert len([line for line in short.out.splitlines() if " delta" in line]) == 2
    assert max(map(len, short.out.splitlines())) <= 80


def test_stores_that_are_not_there_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty" / "manifests").mkdir(parents=True)
    for command in (("log",), ("verify",), ("inspect",), ("gc",)):
        assert "error:" in thinwire(*command, "nowhere", code=2).err
        assert "holds no versions" in thinwire(*command, tmp_path / "empty", code=2).err
    assert not Path("nowhere").exists()
    assert "fsspec does not know" in thinwire("log", "nowhere://x", code=2).err


# --- verify --------------------------------------------------------------------------------------------------------


def verify(store: Path, *args: object, code: int) -> list[tuple[str, str]]:
    """The problems found, as (kind, where)."""
    seen = thinwire("verify", store, *args, "--json", code=code).json
    assert seen["ok"] == (code == 0)
    text = thinwire("verify", store, *args, code=code).out
    for problem in seen["problems"]:
        assert f"{problem['where']}: {problem['message']}" in text
    return [(p["kind"], p["where"]) for p in seen["problems"]]


def test_a_whole_store(published: tuple[Path, list[Path]]) -> None:
    assert verify(published[0], code=0) == []
    assert verify(published[0], "--deep", code=0) == []
    assert thinwire("verify", published[0], "--deep", "--json").json["replayed"] == 7


def test_every_missing_or_damaged_object_is_listed(store: Path) -> None:
    gone, short, bad = object_of(store, 2, "delta*"), object_of(store, 3, "tree.json"), object_of(store, 4, "model*")
    gone.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    flip(bad)
    found = verify(store, code=5)
    assert sorted(found) == sorted(
        [
            ("ObjectNotFoundError", str(gone.relative_to(store))),
            ("DamagedObjectError", str(short.relative_to(store))),
            ("DamagedObjectError", str(bad.relative_to(store))),
        ]
    )
    deep = {where for _, where in verify(store, "--deep", code=5)}
    assert {v for v in range(1, 8) if manifest_key(v) in deep} == {2, 3, 4, 5, 6}  # 7 has an anchor again
    assert thinwire("inspect", store, "--json").json["missing"] == [str(gone.relative_to(store))]


def test_objects_are_read_in_pieces(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.cli import health

    monkeypatch.setattr(health, "_PIECE_BYTES", 1000)
    assert verify(store, code=0) == []
    flip(object_of(store, 7, "model*"), at=-1)
    assert len(verify(store, code=5)) == 1


def test_a_missing_manifest_breaks_the_chain(store: Path) -> None:
    (store / manifest_key(3)).unlink()
    assert verify(store, code=5) == [("ObjectNotFoundError", manifest_key(4))]


def test_manifests_that_contradict_each_other(store: Path, published: tuple[Path, list[Path]], tmp_path: Path) -> None:
    other = tmp_path / "other"
    for step in range(3):
        thinwire("publish", other, published[1][0], "--step", step)
    shutil.copy(other / manifest_key(2), store / manifest_key(2))
    shutil.copytree(other / "objects", store / "objects", dirs_exist_ok=True)
    kinds = {kind for kind, _ in verify(store, code=3)}
    assert "UntrustedError" in kinds
    (store / manifest_key(2)).write_bytes(b"{}")
    assert ("MalformedError", manifest_key(2)) in verify(store, code=3)
    shutil.copy(store / manifest_key(5), store / manifest_key(2))
    assert ("UntrustedError", manifest_key(2)) in verify(store, code=3)


def forge(store: Path, version: int, **changes: object) -> None:
    """Replace fields of a manifest, as somebody with write access can, and make all later ones fit."""
    before = None
    for path in sorted((store / "manifests").iterdir()):
        manifest = Manifest.parse(path.read_bytes())
        if manifest.version == version:
            manifest = replace(manifest, **changes)
        if before is not None:
            manifest = replace(manifest, parent=Parent(manifest.version - 1, before))
        before = manifest.digest
        path.write_bytes(manifest.encode())


def manifest_of(store: Path, version: int) -> Manifest:
    return Manifest.parse((store / manifest_key(version)).read_bytes())


def test_forged_links_are_found(store: Path) -> None:
    third, whole = manifest_of(store, 3), shutil.copytree(store, "whole")
    delta = third.deltas[0]
    for kind, where, text, changes in (
        ("UntrustedError", manifest_key(3), "starts from state", {"deltas": (replace(delta, base_state="0" * 64),)}),
        ("UntrustedError", manifest_key(3), "has an anchor, which has none", {"anchor_version": 2}),
        ("UntrustedError", third.tree.key, "is the tree of state", {"state": "0" * 64}),
    ):
        forge(store, 3, **changes)
        found = thinwire("verify", store, "--json", code=3).json["problems"]
        assert (kind, where) in [(p["kind"], p["where"]) for p in found]
        assert any(text in p["message"] for p in found)
        shutil.rmtree(store)
        shutil.copytree(whole, store)
    (store / manifest_key(3)).write_bytes(replace(third, step=99).encode())  # later ones were built on another
    assert verify(store, code=3) == [("UntrustedError", manifest_key(4))]


def test_objects_that_are_as_published_and_yet_lead_elsewhere_are_found_by_replaying(store: Path) -> None:
    anchor, delta = manifest_of(store, 1).anchor, manifest_of(store, 6).deltas[0].object  # from 5 to 6
    forge(store, 5, deltas=(replace(manifest_of(store, 5).deltas[0], object=delta),))
    forge(store, 7, anchor=anchor)
    assert verify(store, code=0) == []  # all links and digests fit
    deep = thinwire("verify", store, "--deep", "--json", code=5).json["problems"]
    messages = {p["where"]: p["message"] for p in deep if p["kind"] == "DamagedObjectError"}
    assert "delta leads to state" in messages[manifest_key(5)]
    assert "anchor holds state" in messages[manifest_key(7)]


def test_verify_a_patch(tmp_path: Path) -> None:
    tensors = [lively(state(), seed=k) for k in range(3)]
    old, new, other = (save(tmp_path / str(k), t) for k, t in enumerate(tensors))
    thinwire("diff", old, new, "-o", "gaps")
    thinwire("diff", old, new, "-o", "context", "--level", "smallest")
    alone = thinwire("verify", "gaps", "--json").json
    assert (alone["ok"], alone["proved"], alone["decoded"]) == (True, False, alone["segments"])
    assert thinwire("verify", "context", "--json").json["decoded"] < alone["segments"]
    proved = thinwire("verify", "context", "--base", old, "--json").json
    assert (proved["proved"], proved["decoded"]) == (True, alone["segments"])
    before = old.read_bytes()
    thinwire("verify", "context", "--base", other, code=4)
    assert old.read_bytes() == before
    data = Path("gaps").read_bytes()
    Path("bad").write_bytes(data[:-3] + bytes(3))
    assert thinwire("verify", "bad", "--base", old, "--json", code=5).json["error"]["kind"] == "DamagedObjectError"
    Path("bad").write_bytes(data[:-3])
    assert thinwire("verify", "bad", "--json", code=3).json["error"]["kind"] == "MalformedError"
    for args in (("gaps", "--deep"), (old,), ("nothing",)):
        thinwire("verify", *args, code=2)


# --- gc ------------------------------------------------------------------------------------------------------------


def age(store: Path, seconds: float) -> None:
    for path in store.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - seconds,) * 2)


def test_gc_keeps_what_it_says_and_the_store_stays_whole(store: Path, published: tuple[Path, list[Path]]) -> None:
    assert thinwire("gc", store, "--keep-last", 2, "--json").json["deleted"] == []  # all is younger than an hour
    age(store, 5000)
    dry = thinwire("gc", store, "--keep-last", 1, "--keep", 2, "--dry-run", "--json").json
    assert dry["dry_run"]
    assert all((store / info["key"]).exists() for info in dry["deleted"])
    wet = thinwire("gc", store, "--keep-last", 1, "--keep", 2, "--json").json
    assert {info["key"] for info in wet["deleted"]} == {info["key"] for info in dry["deleted"]}
    assert wet["deleted_bytes"] == sum(info["size"] for info in wet["deleted"]) > 0
    assert not any((store / info["key"]).exists() for info in wet["deleted"])
    assert verify(store, "--deep", code=0) == []
    for version in (2, 7):
        thinwire("pull", store, "-o", f"v{version}", "--version", version)
        assert same(load(Path(f"v{version}")), load(published[1][version - 1]))
    assert "no intact chain" in thinwire("pull", store, "-o", "v5", "--version", 5, code=4).err
    assert [v["given_up"] for v in thinwire("log", store, "--json").json["versions"]] == [
        False, True, True, True, True, False, True,
    ]  # fmt: skip
    seen = thinwire("inspect", store, "--json").json
    assert (seen["kept"], seen["anchors"], seen["missing"], seen["problems"]) == ([2, 7], [1, 7], [], [])
    assert "given up" in thinwire("log", store).out
    object_of(store, 7, "model*").unlink()  # what is kept is still looked after
    assert len(verify(store, code=5)) == 1


def test_gc_grace_is_a_duration(store: Path) -> None:
    age(store, 5000)
    for grace in ("2h", "1d", "90m"):
        assert thinwire("gc", store, "--keep-last", 1, "--grace", grace, "--json").json["deleted"] == []
    assert "not a duration" in thinwire("gc", store, "--grace", "soon", code=2).err
    assert thinwire("gc", store, "--keep-last", 1, "--grace", "4000s", "--dry-run").out.startswith("would delete 1")
    assert thinwire("gc", store, "--keep", 99, code=2).err.endswith("there is no version 99 to keep\n")


def test_publishing_goes_on_after_gc(store: Path, published: tuple[Path, list[Path]]) -> None:
    thinwire("gc", store, "--keep-last", 1, "--grace", "0")
    made = thinwire("publish", store, published[1][0], "--json").json
    assert (made["version"], made["kind"]) == (8, "delta")
    thinwire("pull", store, "-o", "d")
    assert torch.equal(load(Path("d"))["k.weight"], load(published[1][0])["k.weight"])
    assert verify(store, "--deep", code=0) == []

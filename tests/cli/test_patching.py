"""diff, apply and inspect on files: bit for bit, all or nothing, an exit code for every kind of failure."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch

from tests.cli.tools import series, thinwire
from tests.sync.checkpoints import bytes_of, lively, load, nudged, same, save, save_sharded, state
from thinwire.sync.checkpoint import open_checkpoint, tree_of_checkpoint


@pytest.mark.parametrize("level", ["fast", "small", "smallest"])
@pytest.mark.parametrize("values", ["ulp", "absolute"])
def test_diff_then_apply_gives_the_same_file(tmp_path: Path, level: str, values: str) -> None:
    (old, new), _ = series(tmp_path, 2)
    made = thinwire("diff", old, new, "-o", "p", "--level", level, "--values", values, "--threads", 2, "--json").json
    assert (made["level"], made["values"], made["bytes"]) == (level, values, os.path.getsize("p"))
    assert made["bytes_per_changed"] == made["bytes"] / made["changed"]
    done = thinwire("apply", old, "p", "-o", "out", "--json").json
    assert Path("out").read_bytes() == new.read_bytes()
    assert done["state"] == made["result"] == tree_of_checkpoint(open_checkpoint(new)).digest


def test_a_sharded_folder_and_a_file(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "base", state())
    new = save(tmp_path / "new", {**nudged(state()), "z.extra": torch.ones(5)})
    thinwire("diff", folder, new, "-o", "p", "--hash", "sha256")
    result = thinwire("apply", folder, "p", "-o", "out")
    assert same(load(Path("out")), load(new))
    assert Path("out/config.json").read_text() == (folder / "config.json").read_text()
    assert "pytorch_model.bin" in result.err
    assert not Path("out/pytorch_model.bin").exists()
    before = bytes_of(Path("out"))
    assert "--overwrite" in thinwire("apply", folder, "p", "-o", "out", code=2).err
    thinwire("apply", folder, "p", "-o", "out", "--overwrite")
    assert bytes_of(Path("out")) == before


def test_a_wrong_base_names_both_digests_and_writes_nothing(tmp_path: Path) -> None:
    (old, new, other), _ = series(tmp_path, 3)
    made = thinwire("diff", old, new, "-o", "p", "--json").json
    before = sorted(os.listdir())
    result = thinwire("apply", other, "p", "-o", "out", "--json", code=4)
    wrong = tree_of_checkpoint(open_checkpoint(other)).digest
    assert result.json["error"]["kind"] == "WrongBaseError"
    assert result.json["error"]["exit_code"] == 4
    assert result.json["error"]["facts"] == {"expected": made["parent"], "actual": wrong}
    assert made["parent"] in result.err
    assert wrong in result.err
    assert sorted(os.listdir()) == before
    text = thinwire("apply", other, "p", "-o", "out", code=4)
    assert (text.out, "error: these weights are" in text.err) == ("", True)


def test_a_damaged_patch_is_refused_at_every_byte(tmp_path: Path) -> None:
    (old, new), _ = series(tmp_path, 2)
    thinwire("diff", old, new, "-o", "p")
    good = Path("p").read_bytes()
    codes = set()
    for at in range(0, len(good), len(good) // 40):
        Path("bad").write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            thinwire("apply", old, "bad", "-o", "out", code=-1)
        except AssertionError as error:
            codes.add(error.args[0][0])
        assert not Path("out").exists()
    assert codes <= {3, 4, 5}
    assert 3 in codes
    Path("bad").write_bytes(good[:-1])
    thinwire("apply", old, "bad", "-o", "out", code=3)


def test_misuse_is_told_before_anything_is_done(tmp_path: Path) -> None:
    (old, new), _ = series(tmp_path, 2)
    thinwire("diff", old, new, "-o", "p")
    before = sorted(os.listdir())
    for args, text in (
        (("diff", old, "nothing", "-o", "q"), "there is no file nothing"),
        (("diff", old, new, "-o", "no/q"), "there is no folder"),
        (("diff", "p", new, "-o", "q"), "is a patch"),
        (("apply", old, "nothing", "-o", "q"), "there is no patch nothing"),
        (("apply", "p", "p", "-o", "q"), "is a patch"),
        (("inspect", "nothing"), "there is no file or folder"),
        (("diff", old, new), "--out"),
        (("diff", old, new, "-o", "q", "--level", "tiny"), "--level"),
    ):
        result = thinwire(*args, code=2)
        assert text in result.err
        assert result.out == ""
    thinwire("apply", old, old, "-o", "q", code=3)  # a checkpoint where a patch belongs
    assert sorted(os.listdir()) == before


def test_a_disk_that_is_full_or_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old, new), _ = series(tmp_path, 2)
    thinwire("diff", old, new, "-o", "p")
    before = sorted(os.listdir())
    for number, code in ((28, 6), (30, 2)):
        error = OSError(number, os.strerror(number), "out")
        monkeypatch.setattr(os, "fsync", lambda _, error=error: (_ for _ in ()).throw(error))
        result = thinwire("apply", old, "p", "-o", "out", code=code)
        assert os.strerror(number) in result.err
    assert sorted(os.listdir()) == before


def test_apply_may_write_over_its_base(tmp_path: Path) -> None:
    (old, new), _ = series(tmp_path, 2)
    thinwire("diff", old, new, "-o", "p")
    thinwire("apply", old, "p", "-o", old)
    assert old.read_bytes() == new.read_bytes()


def test_identical_checkpoints_make_a_patch_of_nothing(tmp_path: Path) -> None:
    (old,), _ = series(tmp_path, 1)
    made = thinwire("diff", old, old, "-o", "p", "--json").json
    assert (made["changed"], made["bytes_per_changed"], made["parent"]) == (0, None, made["result"])
    thinwire("diff", old, old, "-o", "p")
    thinwire("apply", old, "p", "-o", "out")
    assert Path("out").read_bytes() == old.read_bytes()


# --- inspect -------------------------------------------------------------------------------------------------------


def test_inspect_a_patch(tmp_path: Path) -> None:
    new = lively(nudged(state()), seed=1)
    new["0.renamed"] = new.pop("a.weight")
    new["z.raw"] = torch.ones(3)
    old_path = save(tmp_path / "old", {**lively(state(), seed=0), "a.weight": new["0.renamed"]})
    new_path = save(tmp_path / "new", new)
    made = thinwire("diff", old_path, new_path, "-o", "p", "--level", "smallest", "--json").json
    seen = thinwire("inspect", "p", "--json").json
    assert {k: seen[k] for k in ("bytes", "changed", "cells", "parent", "result", "level")} == {
        k: made[k] for k in ("bytes", "changed", "cells", "parent", "result", "level")
    }
    rows = {row["name"]: row for row in seen["tensors"]}
    assert (rows["0.renamed"]["kind"], rows["0.renamed"]["source"]) == ("moved", "a.weight")
    assert (rows["z.raw"]["kind"], rows["z.raw"]["changed"]) == ("raw", 3)
    different = (new["k.weight"].view(torch.int16) != state()["k.weight"].view(torch.int16)).sum().item()
    assert (rows["k.weight"]["changed"], rows["k.weight"]["shape"]) == (different, [128, 128])
    assert seen["removed"] == ["a.weight"]
    assert sum(s["bytes"] for s in seen["segments"]) < made["bytes"]
    assert sum(s["cells"] for s in seen["segments"]) == sum(
        r["cells"] for r in seen["tensors"] if r["kind"] == "sparse"
    )
    assert {s["codec"] for s in seen["segments"]} >= {"context", "none"}
    assert any(s["classes"] > 1 for s in seen["segments"] if s["codec"] == "context")
    text = thinwire("inspect", "p", "--top", 2).out
    assert "k.weight" in text
    assert "g.scale" not in text
    assert made["result"] in text  # in one piece, however narrow the terminal


def test_inspect_a_checkpoint(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "base", state())
    seen = thinwire("inspect", folder, "--json").json
    assert (seen["what"], len(seen["files"]), seen["state"]) == ("checkpoint", 3, None)
    assert [t["name"] for t in seen["tensors"]] == sorted(state())
    assert seen["bytes"] == sum(t.numel() * t.element_size() for t in state().values())
    hashed = thinwire("inspect", folder, "--digest", "--hash", "sha256", "--json").json
    tree = tree_of_checkpoint(open_checkpoint(folder), hash_name="sha256")
    assert hashed["state"] == tree.digest
    assert {t["name"]: t["digest"] for t in hashed["tensors"]} == {n: i.digest for n, i in tree.tensors.items()}
    assert tree.digest in thinwire("inspect", folder, "--digest", "--hash", "sha256").out


def test_inspect_hostile_files(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 64, struct.pack("<Q", 1 << 40), struct.pack("<Q", 4) + b"{}  "):
        (tmp_path / "f").write_bytes(content)
        if content.endswith(b"{}  "):
            assert thinwire("inspect", tmp_path / "f", "--json").json["tensors"] == []
        else:
            assert str(tmp_path / "f") in thinwire("inspect", tmp_path / "f", code=3).err
    (tmp_path / "d").mkdir()
    assert "neither" in thinwire("inspect", tmp_path / "d", code=2).err

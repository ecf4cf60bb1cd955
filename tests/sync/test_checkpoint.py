"""Checkpoints on disk: what is written is what safetensors reads, and appears whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sync.checkpoints import State, bytes_of, load, nudged, same, save, save_sharded, state
from thinwire.errors import (
    DamagedObjectError,
    MalformedError,
    MisuseError,
    ObjectNotFoundError,
    UnsupportedError,
    WrongBaseError,
)
from thinwire.sync import files as files_module
from thinwire.sync import rewrite as rewrite_module
from thinwire.sync.checkpoint import Checkpoint, diff_checkpoints, open_checkpoint, tensors_of, tree_of_checkpoint
from thinwire.sync.encode import Options, take_snapshot
from thinwire.sync.files import copy_bytes, map_private, staged_folder, write_file
from thinwire.sync.layout import MemorySource, StateSource
from thinwire.sync.rewrite import patch_checkpoint
from thinwire.tensors.tree import state_of
from thinwire.wire.patch import Patch


def diff(base: Path, new: Path, **how: object) -> Patch:
    patch = diff_checkpoints(open_checkpoint(base), open_checkpoint(new), Options(threads=2, **how))  # type: ignore[arg-type]
    return Patch.parse(b"".join(patch.encode()))


def apply(base: Path, patch: Patch, out: Path, **how: object) -> None:
    patch_checkpoint(open_checkpoint(base), [patch], out, threads=2, **how)  # type: ignore[arg-type]


# --- diff and apply ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["ulp", "absolute"])
@pytest.mark.parametrize("level", ["fast", "small", "smallest"])
def test_a_file_becomes_the_other_byte_for_byte(tmp_path: Path, level: str, values: str) -> None:
    old, new = save(tmp_path / "old", state()), save(tmp_path / "new", nudged(state()))
    apply(old, diff(old, new, level=level, values=values), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == new.read_bytes()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gone=st.sets(st.sampled_from(sorted(state())), max_size=10),
    fresh=st.sets(st.sampled_from(["0.new", "m.new", "z.new"])),
    reshaped=st.sets(st.sampled_from(["a.weight", "b.weight", "g.scale"])),
    retyped=st.sets(st.sampled_from(["c.half", "k.weight", "i.ids"])),
    sharded=st.booleans(),
)
def test_tensors_come_go_and_change(
    tmp_path_factory: pytest.TempPathFactory,
    gone: set[str],
    fresh: set[str],
    reshaped: set[str],
    retyped: set[str],
    sharded: bool,
) -> None:
    tmp_path = tmp_path_factory.mktemp("x")
    new = nudged(state())
    new = {n: t.reshape(-1) if n in reshaped else t.float() if n in retyped else t for n, t in new.items()}
    new = {**{n: t for n, t in new.items() if n not in gone}, **{n: torch.randn(7).bfloat16() for n in fresh}}
    old_path = save_sharded(tmp_path / "old", state()) if sharded else save(tmp_path / "old", state())
    new_path, out = save(tmp_path / "new", new), tmp_path / "out"
    apply(old_path, diff(old_path, new_path), out)
    assert same(load(out), new)
    assert tree_of_checkpoint(open_checkpoint(out)).digest == tree_of_checkpoint(open_checkpoint(new_path)).digest
    if sharded:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert sorted(index["weight_map"]) == sorted(new)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in new.values())


def test_changed_cells_only_are_written_in_a_copy_and_give_the_same_as_writing_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = save(tmp_path / "old", state()), save(tmp_path / "new", nudged(state()))
    patch = diff(old, new)
    calls = []
    monkeypatch.setattr(rewrite_module, "_write_anew", lambda *a: calls.append(a))
    apply(old, patch, tmp_path / "fast")
    assert not calls
    monkeypatch.undo()
    monkeypatch.setattr(rewrite_module, "_same_size_headers", lambda *_: None)
    apply(old, patch, tmp_path / "slow")
    assert (tmp_path / "fast").read_bytes() == (tmp_path / "slow").read_bytes() == new.read_bytes()


def test_a_sharded_folder_becomes_the_other_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    old, new = save_sharded(tmp_path / "old", state()), save_sharded(tmp_path / "new", nudged(state()))
    written = patch_checkpoint(open_checkpoint(old), [diff(old, new)], tmp_path / "out", threads=2)
    expected = {k: v for k, v in bytes_of(new).items() if k not in ("pytorch_model.bin", os.path.join(".git", "HEAD"))}
    assert bytes_of(tmp_path / "out") == expected
    assert written.left_out == (".git", "pytorch_model.bin")
    assert written.size == sum(len(v) for k, v in expected.items() if k.endswith(".safetensors"))


def test_a_sharded_folder_and_a_file_of_the_same_tensors_have_the_same_digest(tmp_path: Path) -> None:
    tensors = state()
    one = tree_of_checkpoint(open_checkpoint(save(tmp_path / "one", tensors)), hash_name="sha256")
    many = tree_of_checkpoint(open_checkpoint(save_sharded(tmp_path / "many", tensors)), hash_name="sha256", threads=1)
    assert one == many == take_snapshot(StateSource(state_of(tensors)), hash_name="sha256").tree


def test_the_base_is_neither_changed_on_disk_nor_in_the_map(tmp_path: Path) -> None:
    noise = torch.randint(-(1 << 15), 1 << 15, (2, 5000), dtype=torch.int16)  # so dense that it is stored raw
    old = save(tmp_path / "old", {**state(), "noise": noise[0].clone()})
    new = save(tmp_path / "new", {**nudged(state()), "noise": noise[1].clone()})
    before, checkpoint = old.read_bytes(), open_checkpoint(old)
    digest = tree_of_checkpoint(checkpoint).digest
    patch = diff_checkpoints(checkpoint, open_checkpoint(new), Options(level="smallest", threads=1))
    assert any(len(s) == r.cells * 2 + 1 for s, r in zip(patch.segments, patch.segment_rows, strict=True))
    assert old.read_bytes() == before
    assert (patch.parent, tree_of_checkpoint(checkpoint).digest) == (digest, digest)
    apply(old, Patch.parse(b"".join(patch.encode())), tmp_path / "out")
    assert same(load(tmp_path / "out"), load(new))


def test_a_diff_writes_to_no_map_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is written becomes memory of this process: with all of them, that of a whole model."""
    old, new = save(tmp_path / "old", state()), save(tmp_path / "new", nudged(state()))
    maps, real = [], Checkpoint.map
    monkeypatch.setattr(Checkpoint, "map", lambda self: maps.append(real(self)) or maps[-1])
    diff(old, new)
    monkeypatch.undo()
    for source, path in zip(maps, (old, new), strict=True):
        fresh = open_checkpoint(path).map()
        assert all((source.cells[name] == cells).all() for name, cells in fresh.cells.items())


def test_tensors_that_are_not_aligned_in_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unaligned(path: Path, tensors: State) -> Path:
        text, body = {}, b""
        for name, tensor in tensors.items():  # the bool in front shifts everything behind it
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            text[name] = {"dtype": "BF16" if tensor.dtype == torch.bfloat16 else "BOOL", "shape": list(tensor.shape)}
            text[name]["data_offsets"] = [len(body), len(body) + len(raw)]
            body += raw
        header = json.dumps(text).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + body)
        return path

    tensors = {"a": torch.tensor([True]), "b": torch.randn(300).bfloat16()}
    new = {"a": torch.tensor([False]), "b": tensors["b"] * 2}
    old_path, new_path = unaligned(tmp_path / "old", tensors), unaligned(tmp_path / "new", new)
    assert all(c.flags.aligned for c in open_checkpoint(old_path).map().cells.values())
    patch, real = diff(old_path, new_path), rewrite_module._apply

    def apply_to_aligned(patches: list[Patch], source: MemorySource, *rest: object) -> object:
        assert all(cells.flags.aligned for cells in source.cells.values())
        return real(patches, source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(rewrite_module, "_apply", apply_to_aligned)
    apply(old_path, patch, tmp_path / "out")
    assert same(load(tmp_path / "out"), new)


def test_tied_tensors_keep_their_names(tmp_path: Path) -> None:
    old_path = save(tmp_path / "old", state(), {"thinwire.aliases": json.dumps({"head": "a.weight"})})
    new_path = save(tmp_path / "new", nudged(state()), {"thinwire.aliases": json.dumps({"head": "k.weight"})})
    apply(old_path, diff(old_path, new_path), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").aliases == {"head": "k.weight"}
    tensors = tensors_of(open_checkpoint(tmp_path / "out").map())
    assert tensors["head"] is tensors["k.weight"]
    apply(tmp_path / "out", diff(tmp_path / "out", save(tmp_path / "untied", state())), tmp_path / "end")
    assert "thinwire.aliases" not in open_checkpoint(tmp_path / "end").files[0].header.metadata


def test_metadata_stay_but_for_what_a_chain_said_of_the_base(tmp_path: Path) -> None:
    meta = {"format": "pt", "author": "ä", "thinwire.version": "7", "thinwire.state": "00"}
    old, new = save(tmp_path / "old", state(), meta), save(tmp_path / "new", nudged(state()))
    apply(old, diff(old, new), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").files[0].header.metadata == {"format": "pt", "author": "ä"}
    apply(old, diff(old, new), tmp_path / "longer", metadata={"more": "x" * 5000})
    assert open_checkpoint(tmp_path / "longer").files[0].header.metadata["more"] == "x" * 5000
    assert same(load(tmp_path / "longer"), load(tmp_path / "out"))


def test_several_patches_at_once(tmp_path: Path) -> None:
    paths = [save(tmp_path / "0", state())]
    for k in range(1, 4):
        paths.append(save(tmp_path / str(k), nudged(load(paths[-1]), seed=k)))
    patches = [diff(a, b) for a, b in pairwise(paths)]
    patch_checkpoint(open_checkpoint(paths[0]), patches, paths[0])  # in its own place
    assert paths[0].read_bytes() == paths[3].read_bytes()


# --- refusals change nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_wrong_base_leaves_no_trace(tmp_path: Path, kind: str) -> None:
    make = save if kind == "file" else save_sharded
    old, new, other = (make(tmp_path / n, t) for n, t in (("o", state()), ("n", nudged(state())), ("x", state(5))))
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(WrongBaseError) as caught:
        apply(other, diff(old, new), tmp_path / "out")
    assert caught.value.facts["expected"] == tree_of_checkpoint(open_checkpoint(old)).digest
    assert caught.value.facts["actual"] == tree_of_checkpoint(open_checkpoint(other)).digest
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize(("kind", "fail_at"), [("file", 1), ("folder", 1), ("folder", 2), ("folder", 6), ("folder", 7)])
def test_an_error_at_any_sync_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fail_at: int
) -> None:
    make = save if kind == "file" else save_sharded
    old, new = make(tmp_path / "old", state()), make(tmp_path / "new", {**nudged(state()), "z": torch.ones(3)})
    patch, before = diff(old, new), bytes_of(tmp_path)
    calls, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == fail_at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        apply(old, patch, old, overwrite=True)
    assert bytes_of(tmp_path) == before


def test_a_folder_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    old, new = save_sharded(tmp_path / "old", state()), save_sharded(tmp_path / "new", nudged(state()))
    out = tmp_path / "out"
    out.mkdir()
    apply(old, diff(old, new), out)  # an empty one is fine
    (out / "mine").write_text("x")
    with pytest.raises(MisuseError, match="not empty"):
        apply(old, diff(old, new), out)
    assert (out / "mine").exists()
    apply(old, diff(old, new), out, overwrite=True)
    assert not (out / "mine").exists()
    assert same(load(out), load(new))
    assert sorted(os.listdir(tmp_path)) == ["new", "old", "out"]


def test_what_cannot_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    old, new = save(tmp_path / "old", state()), save(tmp_path / "new", nudged(state()))
    patch, folder = diff(old, new), save_sharded(tmp_path / "folder", state())
    for out in (tmp_path / "no" / "out", folder):
        with pytest.raises(MisuseError):
            apply(old, patch, out)
    with pytest.raises(MisuseError, match="the base is a folder"):
        apply(folder, patch, old)
    with pytest.raises(MisuseError, match="no patch"):
        patch_checkpoint(open_checkpoint(old), [], tmp_path / "out")


def test_the_folder_comes_back_if_its_replacement_cannot_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input"), staged_folder(out) as temporary:
        (temporary / "new").write_text("y")
    assert bytes_of(tmp_path) == {os.path.join("out", "precious"): b"x"}


# --- opening -------------------------------------------------------------------------------------------------------


def test_a_folder_prefers_its_single_file_then_its_index_then_whatever_is_there(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "m", state())
    assert len(open_checkpoint(folder).files) == 3
    (folder / "model.safetensors.index.json").unlink()
    save(folder / "extra.safetensors", {"extra": torch.ones(2)})
    assert "extra" in open_checkpoint(folder).tensors
    save(folder / "model.safetensors", {"single": torch.ones(2)})
    assert list(open_checkpoint(folder).tensors) == ["single"]


def edit_index(folder: Path, **change: object) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "x/y.safetensors", ".hidden.safetensors", "config.json", 7, ""]
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, shard: object) -> None:
    folder = save_sharded(tmp_path / "m", state())
    edit_index(folder, weight_map={"a.weight": shard})
    with pytest.raises(MalformedError, match="no file beside it"):
        open_checkpoint(folder)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "m", state())
    edit_index(folder, weight_map={"nowhere": "model-00001-of-00003.safetensors"})
    with pytest.raises(MalformedError, match="nowhere"):
        open_checkpoint(folder)
    edit_index(folder, weight_map={"a.weight": "model-00009-of-00003.safetensors"})
    with pytest.raises(ObjectNotFoundError, match="model-00009"):
        open_checkpoint(folder)
    for text in ("", "[]", "{}", '{"weight_map": {}}', "[" * 100000):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(MalformedError):
            open_checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    save(folder / "twice.safetensors", {"a.weight": torch.ones(2)})
    with pytest.raises(MalformedError, match="both hold"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "aliases", ["[]", "{", '{"x": "nowhere"}', '{"b.weight": "a.weight"}', '{"x": 1}', '{"": "a.weight"}']
)
def test_bad_aliases_are_refused(tmp_path: Path, aliases: str) -> None:
    path = save(tmp_path / "m", state(), {"thinwire.aliases": aliases})
    with pytest.raises(MalformedError):
        open_checkpoint(path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for content in (b"", b"1234567", b"PK\x03\x04 a zip file, as torch.save writes it", struct.pack("<Q", 2) + b"[]"):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(MalformedError, match=str(tmp_path / "f")):
            open_checkpoint(tmp_path / "f")
    header = b'{"a":{"dtype":"F6_E9","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(UnsupportedError, match="F6_E9"):
        open_checkpoint(tmp_path / "f")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "empty", "pipe"):
        with pytest.raises(MisuseError):
            open_checkpoint(tmp_path / name)
    old, new = save(tmp_path / "old", state()), save(tmp_path / "new", nudged(state()))
    write_file(tmp_path / "patch", list(diff(old, new).encode()))
    with pytest.raises(MisuseError, match="is a patch"):
        open_checkpoint(tmp_path / "patch")


def test_a_file_replaced_by_a_shorter_one_after_it_was_opened(tmp_path: Path) -> None:
    old, new = save(tmp_path / "old", state()), save(tmp_path / "new", nudged(state()))
    patch, checkpoint = diff(old, new), open_checkpoint(old)
    save(old, {"a": torch.ones(3)})
    for work in (lambda: checkpoint.map(), lambda: patch_checkpoint(checkpoint, [patch], tmp_path / "out")):
        with pytest.raises(DamagedObjectError, match="was changed"):
            work()
    assert not (tmp_path / "out").exists()


def test_transformers_saves_what_this_opens_and_loads_what_this_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "old", max_shard_size="30KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand(parameter.shape) < 0.02] *= 1.01
    model.save_pretrained(tmp_path / "new", max_shard_size="30KB")
    assert len(open_checkpoint(tmp_path / "old").files) > 1
    apply(tmp_path / "old", diff(tmp_path / "old", tmp_path / "new"), tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "new")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert same(loaded.state_dict(), model.state_dict())


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_a_file_larger_than_the_memory_can_be_mapped(tmp_path: Path) -> None:
    kilobytes = sum(int(x.split()[1]) for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith(("MemTotal", "SwapTotal")))  # fmt: skip  # noqa: E501
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2 * 1024 * kilobytes)  # no block of it is stored
    data = map_private(tmp_path / "huge")
    data[5] = 7
    assert (data[5], data[-1], (tmp_path / "huge").open("rb").read(6)[5]) == (7, 0, 0)


def test_files_are_copied_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_PIECE_BYTES", 1000)
    data = os.urandom(4321)
    (tmp_path / "a").write_bytes(data)
    seen: list[tuple[int, int]] = []
    copy_bytes(tmp_path / "a", tmp_path / "b", progress=lambda *x: seen.append(x))

    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    copy_bytes(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes() == data
    assert seen[-1] == (4321, 4321)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    with pytest.raises(FileExistsError):
        copy_bytes(tmp_path / "a", tmp_path / "b")

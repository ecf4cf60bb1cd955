"""A file of whole tensors that is kept at versions in parts, over any cutting."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.sharded.fleet import State, Trainer, bits, moved
from tests.sharded.test_chunking import Spec, specs
from tests.sharded.test_sharded import state_of_spec
from thinwire.errors import MisuseError, NoPathError
from thinwire.stores.memory import MemoryStore
from thinwire.sync.checkpoint import open_checkpoint
from thinwire.sync.parts_file import PartsFile
from thinwire.sync.remote import Remote
from thinwire.sync.rewrite import change_file

SPEC: Spec = {"a": ((40, 30), "columns"), "b": ((50, 20), "rows"), "n": ((7,), "replicated")}


def parts_file(store: MemoryStore) -> tuple[PartsFile, list[str]]:
    said: list[str] = []
    remote = Remote(store, retry_s=0.0, in_parts=True)
    return PartsFile(remote, avoid=set(), threads=1, stages=None, warn=said.append), said


def same(path: Path, state: State) -> bool:
    found = load_file(path)
    return sorted(found) == sorted(state) and all(bits(found[name]) == bits(state[name]) for name in state)


@settings(max_examples=20)
@given(specs, st.sampled_from([1, 2, 3, 4]), st.integers(1, 40), st.data())
def test_a_file_is_proved_and_patched_under_any_cutting(
    spec: Spec, size: int, group_cells: int, data: st.DataObject
) -> None:
    """The law: it holds a version if and only if all its bits are that version's; patched, it holds the next one."""
    store, states = MemoryStore(), [state_of_spec(spec, 1)]
    trainer = Trainer(store, size, spec, group_cells=group_cells, anchor_ratio=50)
    trainer.publish(states[0])
    for step in (1, 2):
        states.append(moved(states[-1], step, 0.3))
        trainer.publish(states[-1])
    file, said = parts_file(store)
    manifests = [file.remote.manifest(version) for version in (1, 2, 3)]
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "old.safetensors", Path(folder) / "new.safetensors"
        save_file(states[0], path)
        checkpoint = open_checkpoint(path)
        for manifest, state in zip(manifests, states, strict=True):
            assert file.holds(checkpoint, manifest) == all(bits(state[n]) == bits(states[0][n]) for n in state)
        done = file.patch(checkpoint, 1, manifests[0].state, manifests[2], out, metadata={"k": "v"})
        assert not said
        if done is not None:  # else an anchor is smaller, as it is for a few cells
            assert done[0] == 2
            assert same(out, states[2])
            assert open_checkpoint(out).files[0].header.metadata == {"k": "v"}
            assert file.holds(open_checkpoint(out), manifests[2])
        whole = file.fetch(manifests[1])
        assert {n: whole.cells[n].tobytes() for n in whole.cells} == {n: bits(t) for n, t in states[1].items()}
        flipped = bytearray(path.read_bytes())
        if flipped[-1:] and sum(t.numel() for t in states[0].values()):
            at = data.draw(st.integers(checkpoint.files[0].header.data_start, len(flipped) - 1))
            flipped[at] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(bytes(flipped))
            assert not file.holds(open_checkpoint(path), manifests[0])


def test_a_file_that_is_not_what_it_says_is_not_patched(tmp_path: Path) -> None:
    store, state = MemoryStore(), state_of_spec(SPEC, 0)
    trainer = Trainer(store, 2, SPEC, anchor_ratio=100)
    trainer.publish(state)
    new = moved(state, 1)
    trainer.publish(new)
    path, out = tmp_path / "old.safetensors", tmp_path / "out.safetensors"
    first = Remote(store, retry_s=0.0, in_parts=True).manifest(1)

    def patched(of: State, version: int = 1, digest: str = first.state) -> tuple[object, list[str]]:
        file, said = parts_file(store)
        save_file(of, path)
        second = file.remote.manifest(2)
        return file.patch(open_checkpoint(path), version, digest, second, out, metadata={}), said

    bad = {name: tensor.clone() for name, tensor in state.items()}
    bad["a"].view(-1)[5] += 1
    for wrong in (bad, {**state, "more": torch.ones(2)}, {**state, "n": state["n"].reshape(7, 1)}):
        done, said = patched(wrong)
        assert done is None
        assert "fetched anew" in said[0]
    assert patched(state, digest="0" * 64) == (None, [])  # of another chain
    assert patched(state, version=9) == (None, [])
    assert not out.exists()
    assert patched(state)[0] is not None
    assert same(out, new)


def test_a_file_that_is_changed_after_it_was_proved_is_found_out(tmp_path: Path) -> None:
    store, state = MemoryStore(), state_of_spec(SPEC, 0)
    trainer = Trainer(store, 2, SPEC, anchor_ratio=100)
    trainer.publish(state)
    file, said = parts_file(store)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    first = file.remote.manifest(1)
    assert file.holds(open_checkpoint(path), first)
    new = moved(state, 1)
    trainer.publish(new)
    state["b"][3, 3] += 1
    save_file(state, path)
    before = path.read_bytes()
    assert file.patch(open_checkpoint(path), 1, first.state, file.remote.manifest(2), path, metadata={}) is None
    assert "trying another way" in said[0]
    assert path.read_bytes() == before


def test_without_its_map_nothing_is_believed(tmp_path: Path) -> None:
    store, state = MemoryStore(), state_of_spec(SPEC, 0)
    Trainer(store, 2, SPEC).publish(state)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    [key] = [info.key for info in store.list("objects/") if info.key.endswith("chunks.json")]
    store.put(key, [b"{}"])
    file, _ = parts_file(store)
    manifest = file.remote.manifest(1)
    for work in (lambda: file.holds(open_checkpoint(path), manifest), lambda: file.fetch(manifest)):
        with pytest.raises(NoPathError, match="map of chunks"):
            work()


def test_folders_are_not_changed_in_place(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(MisuseError, match="one file"):
        change_file(open_checkpoint(tmp_path), lambda source: None, tmp_path / "out")
    with pytest.raises(MisuseError, match="one file"):
        change_file(open_checkpoint(tmp_path / "model.safetensors"), lambda source: None, tmp_path)

    def fails(source: object) -> None:
        raise RuntimeError

    out = tmp_path / "out.safetensors"
    with pytest.raises(RuntimeError):
        change_file(open_checkpoint(tmp_path / "model.safetensors"), fails, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]

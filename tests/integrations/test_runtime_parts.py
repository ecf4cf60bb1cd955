"""Engines that follow what ranks publish in parts: what is particular to that kind of chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import thinwire
from tests.integrations.chains import Parts
from tests.integrations.engines import Engine, checkpoint
from tests.integrations.test_runtime import bits, loaded, stepped
from tests.sharded.fleet import Trainer, moved
from tests.sharded.fleet import bits as raw
from tests.sharded.test_chunking import Spec, specs
from tests.sharded.test_sharded import state_of_spec
from thinwire.crypto import SigningKey
from thinwire.errors import MisuseError, NoPathError, RefuseError, StoreUnavailableError, UntrustedError
from thinwire.integrations.newest import Newest
from thinwire.integrations.runtime_mirror import PartsMirror, WholeMirror
from thinwire.integrations.runtime_sync import RuntimeSync
from thinwire.peers.memory import MemoryPeers, Room
from thinwire.stores.memory import MemoryStore
from thinwire.sync.trust import Trust
from thinwire.tensors.bits import cells_of
from thinwire.testing.faults import FaultyStore
from thinwire.wire.trust import TrustDocument

pytestmark = pytest.mark.usefixtures("one_thread")


def noted(mirror: PartsMirror, name: str) -> set[int]:
    """The positions of a tensor that are said to have changed; the values told are those of the copy."""
    cells, found = mirror.cells(name), mirror.changes(name)
    if found is None:
        return set(range(cells.size))
    assert np.array_equal(cells[found[0]], found[1])
    return set(found[0].tolist())


@settings(max_examples=20)
@given(specs, st.sampled_from([1, 2, 3, 4]), st.integers(1, 40), st.booleans())
def test_nothing_changes_that_is_not_noted(spec: Spec, size: int, group_cells: int, named: bool) -> None:
    """The law: the copy has the published bits, and all positions whose bits differ are noted."""
    store = MemoryStore()
    trainer = Trainer(store, size, spec, group_cells=group_cells, anchor_ratio=50)
    state = state_of_spec(spec, 1)
    trainer.publish(state)
    mirror = PartsMirror(store, threads=1)
    mirror.open(None, 10.0)
    for step in (1, 2):
        before, state = state, moved(state, step, 0.3)
        trainer.publish(state)
        assert mirror.bring_to(step + 1 if named else None) is not None
        assert {name: mirror.cells(name).tobytes() for name in mirror.layouts} == {n: raw(t) for n, t in state.items()}
        told = mirror.changed()
        for name, tensor in state.items():
            changed = set(np.flatnonzero(cells_of(before[name]) != cells_of(tensor)).tolist())
            assert changed <= (noted(mirror, name) if name in told else set())
        mirror.forget()
        assert not mirror.changed()
    assert mirror.bring_to(None) is None


@pytest.mark.parametrize("size", [1, 2, 4])
def test_of_what_changes_sparsely_no_more_is_noted(size: int) -> None:
    spec: Spec = {"grid": ((64, 40, 3), "grid"), "left": ((90, 80), "columns"), "top": ((80, 90), "rows")}
    store, state = MemoryStore(), state_of_spec(spec, 1)
    trainer = Trainer(store, size, spec, group_cells=2000, anchor_ratio=100)
    trainer.publish(state)
    mirror = PartsMirror(store, threads=1)
    mirror.open(None, 10.0)
    for step in (1, 2):
        before, state = state, moved(state, step, 0.02)
        trainer.publish(state)
        result = mirror.bring_to(None)
        assert result is not None
        assert result.path == "delta"
        for name, tensor in state.items():
            assert noted(mirror, name) == set(np.flatnonzero(cells_of(before[name]) != cells_of(tensor)).tolist())
        mirror.forget()


def begun(store: Any, size: int = 2, **options: Any) -> tuple[Parts, dict[str, torch.Tensor], Engine, RuntimeSync]:
    weights = checkpoint(0)
    trainer = Parts(store, size, anchor_ratio=100, **options)
    trainer.publish(weights, step=0)
    engine = Engine()
    sync = RuntimeSync(store, engine.tensors, engine.load_weights, retry_s=0.2, threads=1)
    sync.open()
    return trainer, weights, engine, sync


def test_when_the_trainer_is_sharded_anew_tensors_are_written_whole_once() -> None:
    store = MemoryStore()
    _, weights, engine, sync = begun(store)
    for size in (3, 1):
        trainer = Parts(store, size, anchor_ratio=100)
        stepped(weights, size)
        assert trainer.publish(weights).kind == "delta+anchor"
        sync.prepare()
        report = sync.swap()
        assert report is not None
        assert (report.whole, report.elements) == (len(sync.map.layouts), 0)
        stepped(weights, size + 7)
        trainer.publish(weights)
        sync.prepare()
        report = sync.swap()
        assert report is not None
        assert report.whole < len(sync.map.layouts)
        assert report.elements > 0
        assert bits(engine) == bits(loaded(weights, 0, 1))
        sync.verify()


def test_what_cannot_be_had_leaves_all_as_it_was_until_it_is_mended() -> None:
    inner, bad = MemoryStore(), False
    store = FaultyStore(inner, lambda done: "missing" if bad and done.key.startswith("objects/") else None)
    trainer, weights, engine, sync = begun(store)
    stepped(weights, 1)
    trainer.publish(weights)
    held, bad = bits(engine), True
    for version in (None, 2):
        with pytest.raises(NoPathError):
            sync.prepare(version)
        assert sync.ready is None
        assert sync.swap() is None
    sync.verify()
    assert bits(engine) == held
    bad = False
    assert sync.prepare(2) == 2
    assert sync.swap() is not None
    assert bits(engine) == bits(loaded(weights, 0, 1))


def test_a_lost_map_of_chunks_is_no_path() -> None:
    store = MemoryStore()
    trainer, weights, engine, sync = begun(store)
    held = bits(engine)
    trainer = Parts(store, 3, anchor_ratio=100)
    stepped(weights, 1)
    trainer.publish(weights)
    [key] = [info.key for info in store.list("objects/0000000002") if info.key.endswith("chunks.json")]
    data = store.get(key, size_max=1 << 24)
    store.delete(key)
    with pytest.raises(NoPathError, match="version 2"):
        sync.prepare()
    with pytest.raises(NoPathError, match="version 2"):
        RuntimeSync(store, engine.tensors, engine.load_weights, retry_s=0.0).open(version=2)
    assert bits(engine) == held
    store.put(key, [data])
    sync.prepare()
    sync.swap()
    assert bits(engine) == bits(loaded(weights, 0, 1))


@pytest.mark.parametrize("make", [thinwire.Publisher, lambda store, **how: Parts(store, 2, **how)])
def test_a_version_with_other_tensors_or_ties_wants_a_store_opened_anew(make: Any) -> None:
    store, weights = MemoryStore(), checkpoint(0)
    make(store, anchor_every=1).publish(weights)
    engine = Engine()
    sync = RuntimeSync(store, engine.tensors, engine.load_weights, retry_s=0.0)
    sync.open()
    held = bits(engine)
    untied = {**weights, "lm_head.weight": weights["lm_head.weight"].clone()}
    make(store, anchor_every=1).publish(untied)
    with pytest.raises(MisuseError, match=r"ties them otherwise.*embed"):
        sync.prepare()
    assert sync.swap() is None
    assert bits(engine) == held
    again = RuntimeSync(store, engine.tensors, engine.load_weights)
    assert again.open().version == 2
    assert again.prepare() is None


def test_a_shared_cache_serves_engines_of_sharded_trainers(tmp_path: Path) -> None:
    asked: list[str] = []

    def look(done: Any) -> None:
        if done.verb.startswith("get") and done.key.startswith("objects/"):
            asked.append(done.key)

    store = FaultyStore(MemoryStore(), look)
    trainer, weights = Parts(store, 2, anchor_ratio=100), checkpoint(0)
    trainer.publish(weights)
    engines = [Engine() for _ in range(3)]
    followers = [RuntimeSync(store, e.tensors, e.load_weights, cache=tmp_path / "cache", poll_s=0.01) for e in engines]
    for follower in followers:
        follower.open()
    assert len(asked) == len(set(asked))  # each object came from the store once
    asked.clear()
    stepped(weights, 1)
    trainer.publish(weights)
    asked.clear()
    for follower in followers:
        while follower.prepare() != 2:
            pass
        follower.swap()
    assert asked
    assert len(asked) == len(set(asked))
    assert {str(bits(engine)) for engine in engines} == {str(bits(loaded(weights, 0, 1)))}


def test_peers_have_what_the_store_need_not_send_again() -> None:
    room, store, weights = Room(), FaultyStore(MemoryStore()), checkpoint(0)
    trainer = Parts(store, 2, anchor_ratio=100)
    trainer.publish(weights)
    engines = [Engine() for _ in range(2)]
    followers = [RuntimeSync(store, e.tensors, e.load_weights, peers=MemoryPeers(room)) for e in engines]
    begun_at = len(store.log)
    for follower in followers:
        follower.open()
    stepped(weights, 1)
    trainer.publish(weights)
    for follower in followers:
        assert follower.prepare() == 2
        follower.swap()
    asked = [done.key for done in store.log[begun_at:] if done.verb.startswith("get") and "objects/" in done.key]
    assert sum(key.endswith("delta.safetensors") for key in asked) == 2  # one of each rank, for both
    assert len(asked) == len(set(asked))
    assert [bits(engine) for engine in engines] == [bits(loaded(weights, 0, 1))] * 2


def test_keys_are_pinned_and_what_was_seen_is_remembered(tmp_path: Path) -> None:
    key, store = SigningKey.generate(), MemoryStore()
    trust = Trust(TrustDocument.of_keys([key.public]))
    weights, engine = checkpoint(0), Engine()
    trainer = Parts(store, 2, key=key, trust=trust)
    trainer.publish(weights)
    older = MemoryStore()
    for info in list(store.list("")):
        older.put(info.key, [store.get(info.key, size_max=1 << 24)])
    stepped(weights, 1)
    trainer.publish(weights)
    how: dict[str, Any] = {"trust": trust, "memory": tmp_path / "seen.json", "retry_s": 0.0}
    assert RuntimeSync(store, engine.tensors, engine.load_weights, **how).open().version == 2
    assert bits(engine) == bits(loaded(weights, 0, 1))
    with pytest.raises(UntrustedError, match="rollback"):
        RuntimeSync(older, engine.tensors, engine.load_weights, **how).open()
    stranger = Trust(TrustDocument.of_keys([SigningKey.generate().public]))
    with pytest.raises(UntrustedError):
        RuntimeSync(store, engine.tensors, engine.load_weights, trust=stranger).open()


def test_who_asks_for_the_newest_version_learns_of_either_kind() -> None:
    store = MemoryStore()
    with pytest.raises(StoreUnavailableError, match="publisher running"):
        Newest(store, {"retry_s": 0.0}).manifest(timeout_s=0.0)
    with pytest.raises(StoreUnavailableError, match="publisher running"):
        RuntimeSync(store, {}, lambda _: None).open(timeout_s=0.0)
    trainer = Parts(store, 2)
    trainer.publish(checkpoint(0))
    newest = Newest(store, {})
    assert newest() == 1
    assert len(newest.manifest().parts) == 2
    assert RuntimeSync(store, {}, lambda _: None).newest() == 1
    with pytest.raises((MisuseError, RefuseError), match="in 2 parts"):
        WholeMirror(store).open(None, 1.0)
    whole = MemoryStore()
    thinwire.Publisher(whole).publish(checkpoint(0))
    with pytest.raises(MisuseError, match=r"thinwire\.Consumer"):
        PartsMirror(whole).open(None, 1.0)

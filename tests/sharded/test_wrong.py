"""What goes wrong: stores that fail, parts damaged or missing, trainers that race. Nothing is lost or mixed."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch

from tests.sharded.fleet import State, Trainer, empty_like, moved, same_bits, shards
from tests.sharded.test_chunking import Spec
from tests.sharded.threads import together
from thinwire.crypto import SigningKey
from thinwire.errors import ConflictError, MisuseError, NoPathError, RetryError, ThinwireError, UntrustedError
from thinwire.stores import Store
from thinwire.stores.memory import MemoryStore
from thinwire.sync.collector import collect
from thinwire.sync.consumer import Consumer
from thinwire.sync.publisher import Publisher
from thinwire.sync.sharded_consumer import ShardedConsumer
from thinwire.sync.sharded_publisher import ShardedPublisher
from thinwire.sync.shards import Slice, held_by
from thinwire.sync.trust import Trust
from thinwire.testing.faults import Fault, FaultyStore, Kind
from thinwire.wire import canonical
from thinwire.wire.digests import hasher
from thinwire.wire.manifest import Manifest, manifest_key, state_of_parts
from thinwire.wire.trust import TrustDocument

SPEC: Spec = {"a": ((300, 200), "rows"), "b": ((200, 300), "columns"), "n": ((50,), "replicated")}


def first_state() -> State:
    torch.manual_seed(0)
    return {name: torch.randn(shape).bfloat16() for name, (shape, _) in SPEC.items()}


def begun(size: int, versions: int = 1, **options: Any) -> tuple[MemoryStore, Trainer, list[State]]:
    store = MemoryStore()
    trainer = Trainer(store, size, SPEC, **{"anchor_ratio": 100, "group_cells": 5000, **options})
    states = [first_state()]
    trainer.publish(states[0], step=0)
    for step in range(1, versions):
        states.append(moved(states[-1], step))
        trainer.publish(states[-1], step=step)
    return store, trainer, states


def reader(
    store: Store, rank: int = 0, size: int = 1, names: tuple[str, ...] = ("a", "b", "n"), **options: Any
) -> tuple[ShardedConsumer, dict[str, Slice]]:
    mine = empty_like(shards({name: first_state()[name] for name in names}, SPEC, rank, size))
    consumer = ShardedConsumer(store, partial=True, threads=1, retry_s=0.2, **options)
    consumer.load(mine)
    return consumer, mine


# --- following -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flip", "short", "missing", "swap"])
def test_what_was_damaged_however_often_it_was_asked_for_is_asked_for_again_later(kind: Kind) -> None:
    inner, trainer, states = begun(2)
    bad = False
    store = FaultyStore(inner, lambda done: kind if bad and done.key.startswith("objects/") else None)
    consumer, mine = reader(store)
    trainer.publish(moved(states[0], 1), step=1)
    bad = True
    version = consumer.poll()
    assert version is not None
    with pytest.raises(NoPathError):
        version.apply(mine)
    assert consumer.version == 1
    assert same_bits(mine, states[0])
    bad = False
    version = consumer.poll()
    assert version is not None
    assert version.apply(mine).path == "delta"
    assert same_bits(mine, moved(states[0], 1))


# --- publishing ----------------------------------------------------------------------------------------------------


def test_where_the_store_fails_on_one_rank_the_version_waits_on_all_and_goes_out_later() -> None:
    store, trainer, states = begun(3)
    inner = trainer.publishers[1].store
    trainer.publishers[1].store = FaultyStore(inner, [Fault("put", k, "unavailable") for k in range(1, 60)])
    new = moved(states[0], 1)
    works = [partial(p.publish, shards(new, SPEC, k, 3), step=1) for k, p in enumerate(trainer.publishers)]

    def told(work: Any) -> str:
        try:
            work()
        except RetryError as error:
            return str(error)
        return ""

    messages = together([partial(told, work) for work in works])
    assert all(messages)
    assert messages[0].startswith("on rank 1:")
    consumer, mine = reader(store)
    assert consumer.version == 1
    trainer.publishers[1].store = inner
    newer = moved(new, 2)
    assert trainer.publish(newer, step=2).version == 3
    assert same_bits(mine, states[0])
    version = consumer.poll(every=True)
    assert version is not None
    version.apply(mine)
    assert (version.number, version.step) == (2, 1)
    assert same_bits(mine, new)


def test_two_world_sizes_race_and_one_of_them_is_told() -> None:
    store, one, states = begun(2)
    other = Trainer(store, 4, SPEC)
    left, right = moved(states[0], 1), moved(states[0], 2)
    one.publish(left, step=1)  # both have seen version 1; the other meets version 2 at its own commit
    assert other.publish(right, step=1).version == 3
    with pytest.raises(ConflictError, match="start new publishers"):
        one.publish(moved(left, 3), step=2)
    again = Trainer(store, 2, SPEC)
    last = moved(right, 4)
    assert again.publish(last, step=9).version == 4
    for rank, size in ((0, 1), (2, 3)):
        _, mine = reader(store, rank, size)
        assert same_bits(mine, last)


def test_a_conflict_at_the_very_commit_mixes_nothing() -> None:
    store, one, states = begun(2)
    other = Trainer(store, 4, SPEC)
    left, right = moved(states[0], 1), moved(states[0], 2)
    for trainer, state in ((one, left), (other, right)):
        together([
            partial(_make_only, publisher, shards(state, SPEC, rank, trainer.size))
            for rank, publisher in enumerate(trainer.publishers)
        ])  # fmt: skip
    assert together([publisher.flush for publisher in other.publishers])[0] is not None
    with pytest.raises(ConflictError):
        together([publisher.flush for publisher in one.publishers])
    consumer, mine = reader(store)
    assert consumer.version == 2
    assert same_bits(mine, right)


def _make_only(publisher: ShardedPublisher, model: dict[str, Slice]) -> None:
    publisher._open()
    from thinwire.sync.sharded_making import new_word

    publisher._pending = publisher._maker.make(
        model, publisher._head, new_word(1, None), chain_bytes=0, anchor_ratio=9, anchor_every=None
    )


def test_another_number_of_ranks_goes_on_and_sends_only_what_changed() -> None:
    store, _, states = begun(3, versions=3)
    consumer, mine = reader(store)
    for size in (1, 4, 2):
        trainer = Trainer(store, size, SPEC, anchor_ratio=100, group_cells=5000)
        states.append(moved(states[-1], size))
        report = trainer.publish(states[-1])
        assert report.kind == "delta+anchor"
        assert report.changed < report.elements / 5
        states.append(moved(states[-1], size + 7))
        assert trainer.publish(states[-1]).kind == "delta"
        version = consumer.poll()
        assert version is not None
        version.apply(mine)
        assert same_bits(mine, states[-1])


def test_ranks_that_do_not_hold_all_of_a_tensor_are_told_on_every_rank() -> None:
    store = MemoryStore()
    trainer = Trainer(store, 2, SPEC)
    state = first_state()
    held = [shards(state, SPEC, rank, 2) for rank in range(2)]
    del held[1]["a"]
    works = [partial(trainer.publishers[rank].publish, held[rank]) for rank in range(2)]
    with pytest.raises(MisuseError, match="once and whole"):
        together(works)
    held[1]["a"] = "no tensor"  # type: ignore[assignment]
    works = [partial(trainer.publishers[rank].publish, held[rank]) for rank in range(2)]
    with pytest.raises(MisuseError, match="on rank 1"):
        together(works)
    assert trainer.publish(state).version == 1


def test_settings_that_differ_are_refused() -> None:
    trainer = Trainer(MemoryStore(), 2, SPEC)
    trainer.publishers[1]._maker.cut = trainer.publishers[1]._maker.cut._replace(slices=2)
    with pytest.raises(MisuseError, match="different settings"):
        trainer.publish(first_state())


# --- reading -------------------------------------------------------------------------------------------------------


def damage(store: MemoryStore, key: str, at: float) -> None:
    data = bytearray(store.get(key, size_max=1 << 30))
    data[int(at * (len(data) - 1))] ^= 0xFF
    store.put(key, [data])


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("what", ["delta.safetensors", "tree.json"])
def test_a_damaged_part_changes_nothing_and_is_gone_around(what: str, at: float) -> None:
    store, trainer, states = begun(2)
    consumer, mine = reader(store, names=("a", "b") if what.startswith("delta") else ("n",))
    states.append(moved(states[-1], 1))
    trainer.publish(states[-1])
    for key in [info.key for info in store.list("objects/0000000002") if info.key.endswith(what)]:
        damage(store, key, at)
    version = consumer.poll()
    assert version is not None
    with pytest.raises(NoPathError):
        version.apply(mine)
    assert same_bits(mine, states[0])
    assert consumer.version == 1
    other = Trainer(store, 2, SPEC, anchor_every=1)
    other.publish(states[-1])
    version = consumer.poll()
    assert version is not None
    version.apply(mine)
    assert same_bits(mine, states[-1])


def test_a_model_that_was_changed_is_loaded_anew() -> None:
    store, trainer, states = begun(2)
    consumer, mine = reader(store)
    mine["a"].tensor[3, 3] += 1
    states.append(moved(states[-1], 1))
    trainer.publish(states[-1])
    version = consumer.poll()
    assert version is not None
    assert version.apply(mine).path == "anchor+delta"
    assert same_bits(mine, states[-1])


def rewritten(store: MemoryStore, version: int, edit: Any) -> None:
    """Replace a manifest by one that is as good as any, but for what ``edit`` does to it."""
    value = Manifest.parse(store.get(manifest_key(version), size_max=1 << 24)).signed()
    edit(value)
    digest = hasher("blake3")(canonical.dump(value)).digest().hex()
    store.put(manifest_key(version), [canonical.dump({"digest": digest, "signatures": [], "signed": value})])


def test_a_shard_that_is_missing_from_a_manifest_is_an_error() -> None:
    store, _, _ = begun(2)

    def edit(value: dict[str, Any]) -> None:
        value["parts"].pop()
        states = [part["state"] for part in value["parts"]]
        value["state"] = state_of_parts("blake3", value["tree"]["digest"], states)

    rewritten(store, 1, edit)
    with pytest.raises(ThinwireError, match="parts are missing"):
        reader(store)


@pytest.mark.parametrize("left", [0, 1])
def test_who_follows_is_told_of_a_newer_version_without_its_parts(left: int) -> None:
    store, trainer, states = begun(2)
    consumer, mine = reader(store)
    trainer.publish(moved(states[0], 1))

    def edit(value: dict[str, Any]) -> None:
        del value["parts"][left:]
        digests = [part["state"] for part in value["parts"]]
        value["state"] = state_of_parts("blake3", value["tree"]["digest"], digests)
        if not left:
            value["format"] = "thinwire.manifest.v1"
            del value["parts"]
            value.update(deltas=[], anchor=[])

    def go_on() -> None:
        version = consumer.poll()
        assert version is not None
        version.apply(mine)

    rewritten(store, 2, edit)
    with pytest.raises(ThinwireError):
        go_on()
    assert consumer.version == 1
    assert same_bits(mine, states[0])


def test_parts_of_two_runs_cannot_be_mixed() -> None:
    store, _, _ = begun(2)
    other = MemoryStore()
    Trainer(other, 2, {**SPEC, "b": (SPEC["b"][0], "rows")}, group_cells=5000).publish(first_state(), step=0)
    for info in other.list("objects/"):
        store.put(info.key, [other.get(info.key, size_max=1 << 30)])
    foreign = Manifest.parse(other.get(manifest_key(1), size_max=1 << 24)).signed()

    def edit(value: dict[str, Any]) -> None:
        value["parts"][1] = foreign["parts"][1]
        value["state"] = state_of_parts("blake3", value["tree"]["digest"], [p["state"] for p in value["parts"]])

    rewritten(store, 1, edit)
    with pytest.raises(NoPathError, match=r"lacks|not what its trees say"):
        reader(store)


def test_segments_that_reach_over_groups_are_refused() -> None:
    from thinwire.errors import MalformedError
    from thinwire.sync.share import _needed
    from thinwire.wire.patch import Row, SegmentRow

    rows = [Row("000000/a@0", "U8", (10,), "sparse", 1), Row("000001/a@10", "U8", (10,), "sparse", 0)]
    assert _needed(rows, [SegmentRow("U8", 10, 1, 5), SegmentRow("U8", 10, 0, 0)], {"000000/a@0"}, 100)[0] == [
        (100, 105)
    ]
    with pytest.raises(MalformedError, match="from one group"):
        _needed(rows, [SegmentRow("U8", 20, 1, 5)], {"000000/a@0"}, 100)


def test_readers_of_the_other_kind_are_told_where_to_go() -> None:
    store, _, _ = begun(2)
    with pytest.raises(MisuseError, match="ShardedConsumer"):
        Consumer(store).load(first_state())
    with pytest.raises(MisuseError, match="ShardedPublisher"):
        Publisher(store).publish(first_state())
    plain = MemoryStore()
    Publisher(plain).publish(first_state())
    with pytest.raises(MisuseError, match=r"thinwire\.Consumer"):
        reader(plain)
    with pytest.raises(MisuseError, match="not sharded"):
        Trainer(plain, 2, SPEC).publish(first_state())


def test_models_that_do_not_fit_are_refused() -> None:
    store, trainer, states = begun(2)
    state = first_state()
    with pytest.raises(MisuseError, match="partial=True"):
        ShardedConsumer(store).load({"a": state["a"]})
    with pytest.raises(MisuseError, match="not published"):
        ShardedConsumer(store, partial=True).load({"c": state["a"]})
    with pytest.raises(MisuseError, match="convert the model"):
        ShardedConsumer(store, partial=True).load({"a": state["a"].float()})
    with pytest.raises(MisuseError, match="load a version first"):
        ShardedConsumer(store).poll()
    consumer, mine = reader(store)
    trainer.publish(moved(states[0], 1))
    version = consumer.poll()
    assert version is not None
    with pytest.raises(MisuseError, match="other slices"):
        version.apply({"n": mine["n"]})
    for bad in (Slice(state["a"], (0,), (300, 200)), Slice(state["a"], (1, 0), (300, 200)), 3):
        with pytest.raises(MisuseError, match="'a'"):
            held_by({"a": bad})  # type: ignore[dict-item]


def test_only_what_pinned_keys_have_signed_is_taken() -> None:
    key, store = SigningKey.generate(), MemoryStore()
    trust = Trust(TrustDocument.of_keys([key.public]))
    trainer = Trainer(store, 2, SPEC, key=key, trust=trust)
    states = [first_state(), moved(first_state(), 1)]
    trainer.publish(states[0])
    consumer, mine = reader(store, trust=trust)
    trainer.publish(states[1])
    version = consumer.poll()
    assert version is not None
    version.apply(mine)
    assert same_bits(mine, states[1])
    rewritten(store, 2, lambda value: value.update(step=77))
    with pytest.raises(UntrustedError):
        reader(store, trust=trust)


def test_collecting_keeps_what_kept_versions_need() -> None:
    store, _, states = begun(2, versions=4, anchor_every=3)
    trainer2 = Trainer(store, 3, SPEC, anchor_ratio=100, group_cells=5000)
    for step in range(4, 8):
        states.append(moved(states[-1], step))
        trainer2.publish(states[-1], step=step)
    follower, held = reader(store)
    report = collect(store, keep_last=2, keep=frozenset({2}), grace_s=0, now_s=4e9)
    assert report.kept == (2, 7, 8)
    assert report.deleted
    for number in report.kept:
        mine = empty_like(shards(states[0], SPEC, 1, 2))
        ShardedConsumer(store, partial=True, threads=1).load(mine, version=number)
        assert same_bits(mine, states[number - 1])
    states.append(moved(states[-1], 9))
    trainer2.publish(states[-1])
    version = follower.poll()
    assert version is not None
    version.apply(held)
    assert same_bits(held, states[-1])


def test_a_map_names_every_part(one_thread: None) -> None:
    store, _, _ = begun(2)
    manifest = json.loads(store.get(manifest_key(1), size_max=1 << 24))
    assert len(manifest["signed"]["parts"]) == 2
    assert manifest["signed"]["format"] == "thinwire.manifest.v2"

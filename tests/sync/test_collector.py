"""Collecting garbage never breaks a version that it keeps, whatever was published and whatever crashed."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sync.checkpoints import same
from thinwire import Consumer, Publisher
from thinwire.errors import MalformedError, MisuseError, NoPathError, ObjectNotFoundError, RetryError
from thinwire.stores.memory import MemoryStore
from thinwire.stores.protocol import Blob
from thinwire.sync.collector import COLLECTED_KEY, all_manifests, collect, expected_objects, read_collected
from thinwire.sync.remote import Remote
from thinwire.tensors.bits import tensor_of
from thinwire.testing.faults import Fault, FaultyStore
from thinwire.wire.manifest import manifest_key

State = dict[str, torch.Tensor]
LATER = 10 * 3600.0


def publish(store: MemoryStore, count: int, **how: object) -> list[State]:
    """``count`` versions; returns the state of each."""
    generator = torch.Generator().manual_seed(0)
    state = {"w": torch.randn(2000, generator=generator).bfloat16(), "b": torch.zeros(7)}
    states = []
    publisher = Publisher(store, threads=1, **how)  # type: ignore[arg-type]
    for step in range(count):
        state["w"][torch.rand(2000, generator=generator) < 0.05] *= 1.01
        state["b"] += 1
        publisher.publish(state, step=step)
        states.append({name: tensor.clone() for name, tensor in state.items()})
    return states


def fetch(store: MemoryStore, version: int) -> State:
    held = Consumer(store, threads=1, retry_s=0).fetch(version=version)
    return {name: tensor_of(held.cells[name], x.dtype.name, x.shape) for name, x in held.layouts.items()}


def keys(store: MemoryStore, prefix: str = "") -> set[str]:
    return {info.key for info in store.list(prefix)}


def run(store: MemoryStore, keep_last: int, **how: object):  # type: ignore[no-untyped-def]
    return collect(store, **{"keep_last": keep_last, "grace_s": 3600, "now_s": time.time() + LATER, **how})  # type: ignore[arg-type]


@settings(max_examples=25)
@given(data=st.data(), count=st.integers(1, 9), anchor_every=st.sampled_from([None, 1, 2, 3, 5]))
def test_kept_versions_can_be_had_bit_for_bit(data: st.DataObject, count: int, anchor_every: int | None) -> None:
    store = MemoryStore()
    states = publish(store, count, anchor_every=anchor_every)
    for _ in range(data.draw(st.integers(1, 3))):  # one collection after another
        report = run(store, data.draw(st.integers(1, 12)), keep=data.draw(st.sets(st.integers(1, count), max_size=3)))
        for version in report.kept:
            assert same(fetch(store, version), states[version - 1])
        assert not set(report.gone) & set(report.kept)
        kept, needed = expected_objects(all_manifests(Remote(store, retry_s=0)), read_collected(store, retry_s=0))
        assert set(needed) <= keys(store)
        assert set(report.kept) <= kept
        assert report.kept_objects == len(keys(store, "objects/"))  # all is old enough: nothing else is left
    assert len(keys(store, "manifests/")) == count
    later = publish(store, 2, anchor_every=anchor_every)  # a new publisher goes on from what is left
    assert same(fetch(store, count + 2), later[-1])
    report = run(store, 1)
    assert report.kept[-1] == count + 2
    assert same(fetch(store, count + 2), later[-1])


def test_a_consumer_at_a_kept_version_goes_on_by_deltas() -> None:
    store = MemoryStore()
    states = publish(store, 6, anchor_every=3)
    model = {name: torch.zeros_like(tensor) for name, tensor in states[0].items()}
    consumer = Consumer(store, retry_s=0)
    consumer.load(model, version=3)
    run(store, 4)
    version = consumer.poll()
    assert version is not None
    result = version.apply(model)
    assert (result.version, result.path) == (6, "delta")
    assert same(model, states[5])


def test_what_was_given_up_is_remembered_and_cannot_be_had() -> None:
    store = MemoryStore()
    publish(store, 6, anchor_every=2)
    report = run(store, 1)
    assert report.kept == (6,)
    assert report.deleted_bytes == sum(info.size for info in report.deleted) > 0
    collected = read_collected(store, retry_s=0)
    assert collected is not None
    assert [v for v in range(1, 9) if collected.gave_up(v)] == [1, 2, 3, 4, 5]
    with pytest.raises(NoPathError):
        fetch(store, 2)
    again = run(store, 3, keep={1})
    assert (again.kept, again.gone, again.deleted) == ((6,), (1, 4, 5), ())


def test_a_dry_run_changes_nothing_and_says_what_a_real_one_does() -> None:
    store = MemoryStore()
    publish(store, 5, anchor_every=2)
    before = keys(store)
    dry = run(store, 1, dry_run=True)
    assert keys(store) == before
    wet = run(store, 1)
    assert {i.key for i in dry.deleted} == {i.key for i in wet.deleted} == before - keys(store)
    assert wet.deleted


def test_the_young_are_spared() -> None:
    store = MemoryStore()
    publish(store, 5, anchor_every=2)
    before = keys(store)
    report = run(store, 1, now_s=time.time() + 3000)
    assert (report.deleted, keys(store)) == ((), before)
    assert report.young_objects > 0
    assert report.young_bytes > 0
    assert COLLECTED_KEY not in before


def test_orphans_go_once_their_number_is_taken_and_not_before() -> None:
    store = MemoryStore()
    publish(store, 2)
    orphan, pending = "objects/0000000002-00ff00ff00ff/delta.safetensors", "objects/0000000003-00ff00ff00ff/tree.json"
    foreign = "objects/somebody-elses"
    for key in (orphan, pending, foreign):
        store.put(key, [b"left by a crash"])
    report = run(store, 20)
    assert [info.key for info in report.deleted] == [orphan]
    assert {pending, foreign} <= keys(store)
    publish(store, 1)
    assert [info.key for info in run(store, 20).deleted] == [pending]


def test_a_publisher_whose_manifest_waits_for_the_store_is_not_robbed_of_its_objects() -> None:
    inner = MemoryStore()
    faulty = FaultyStore(inner, [Fault("create", 4, "unavailable")])
    publisher = Publisher(faulty, retry_s=0, single_publisher=True)
    state = {"w": torch.arange(100.0)}
    faults_before = 0
    for step in range(8):
        state["w"] += 1
        try:
            publisher.publish(state, step=step)
        except RetryError:
            faults_before += 1
            run(inner, 1, grace_s=0)
            publisher.flush()
    assert faults_before == 1
    assert all(same(fetch(inner, v), {"w": torch.arange(100.0) + v}) for v in run(inner, 20).kept)
    assert same(fetch(inner, 8), state)


class CommitsMeanwhile:
    """A store in which somebody publishes while objects are listed."""

    def __init__(self, inner: MemoryStore) -> None:
        self.inner, self.published = inner, False

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def list(self, prefix: str, *, start_after: str = ""):  # type: ignore[no-untyped-def]
        found = list(self.inner.list(prefix, start_after=start_after))
        if prefix == "objects/" and not self.published:
            self.published = True
            publish(self.inner, 3)
        return iter(found)


def test_versions_committed_meanwhile_are_honoured() -> None:
    inner = MemoryStore()
    publish(inner, 4, anchor_every=2)
    report = run(CommitsMeanwhile(inner), 2)  # type: ignore[arg-type]
    assert report.kept == (6, 7)
    for version in report.kept:
        fetch(inner, version)


def test_nothing_is_deleted_when_a_manifest_is_missing_or_not_understood() -> None:
    store = MemoryStore()
    publish(store, 5, anchor_every=2)
    before, good = keys(store), store.get(manifest_key(2), size_max=10**6)
    store.put(manifest_key(2), [good.replace(b"thinwire.manifest.v1", b"thinwire.manifest.v9")])
    with pytest.raises(Exception, match="upgrade"):
        run(store, 1)
    store.put(manifest_key(2), [b"{"])
    with pytest.raises(MalformedError):
        run(store, 1)
    store.put(manifest_key(2), [good])
    missing = FaultyStore(store, [Fault("get", 2, "missing", times=100)])
    with pytest.raises((ObjectNotFoundError, MisuseError)):
        run(missing, 1)  # type: ignore[arg-type]
    assert keys(store) == before


def test_objects_of_a_version_whose_manifest_was_lost_stay() -> None:
    store = MemoryStore()
    publish(store, 6, anchor_every=2)
    data = store.get(manifest_key(2), size_max=10**6)
    store.delete(manifest_key(2))
    mine = {key for key in keys(store, "objects/") if key.startswith("objects/0000000002-")}
    run(store, 1)
    assert mine <= keys(store)
    store.put(manifest_key(2), [data])  # found again
    assert {i.key for i in run(store, 1).deleted} == mine


def test_a_crash_in_the_middle_is_finished_by_the_next_run_and_is_no_damage() -> None:
    store = MemoryStore()
    publish(store, 6, anchor_every=2)
    faulty = FaultyStore(store, [Fault("delete", 3, "unavailable", times=1000)])
    with pytest.raises(RetryError):
        run(faulty, 1, retry_s=0)  # type: ignore[arg-type]
    kept, needed = expected_objects(all_manifests(Remote(store, retry_s=0)), read_collected(store, retry_s=0))
    assert kept == {6}
    assert set(needed) <= keys(store)
    run(store, 1)
    assert set(needed) == keys(store, "objects/")


def test_misuse() -> None:
    store = MemoryStore()
    with pytest.raises(MisuseError, match="no versions"):
        run(store, 1)
    publish(store, 1)
    for how in ({"keep": {7}}, {"grace_s": -1}, {"keep_last": 0}):
        with pytest.raises(MisuseError):
            run(store, **{"keep_last": 1, **how})


@pytest.mark.parametrize("note", [b"", b"[]", b"{", b'{"format":"other","kept":[],"newest":9}', b'{"format":"thinwire.collected.v1","kept":["1"],"newest":9}'])  # fmt: skip  # noqa: E501
def test_an_unreadable_note_means_that_everything_is_expected(note: bytes) -> None:
    store = MemoryStore()
    publish(store, 2)
    blob: Blob = [note]
    store.put(COLLECTED_KEY, blob)
    assert read_collected(store, retry_s=0) is None
    assert expected_objects(all_manifests(Remote(store, retry_s=0)), None)[0] == {1, 2}

"""Skip deltas: who is behind catches up by few bytes; what is wrong with one costs time and never a wrong weight."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sync.checkpoints import lively, same
from tests.sync.skipping import State, advance, at, copy_of, keys, manifest_of, publish, reads
from thinwire import Consumer, Publisher
from thinwire.errors import MisuseError, RetryError
from thinwire.stores.memory import MemoryStore
from thinwire.sync.collector import collect
from thinwire.sync.compactor import Compactor, compact, ladder
from thinwire.sync.compose import in_context
from thinwire.sync.remote import Remote
from thinwire.tensors.bits import tensor_of
from thinwire.testing.faults import Fault, FaultyStore
from thinwire.wire.manifest import manifest_key
from thinwire.wire.patch import Patch
from thinwire.wire.skip import skip_folder, skip_key, skip_of_key

# --- the ladder ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_between_any_two_versions_is_a_way_of_logarithmic_length(a: int, b: int) -> None:
    low, high = sorted((a, b))
    hops, here = 0, low
    while here < high:
        here = max([here + 1, *(here + (1 << k) for k in range(1, 13) if here in set(ladder(here + (1 << k)))
                                and here + (1 << k) <= high)])  # fmt: skip
        hops += 1
    assert hops <= 2 * max((high - low).bit_length(), 1)


def test_keys_tell_what_they_are() -> None:
    assert skip_of_key(skip_key(4, 8)) == (4, 8) == skip_of_key(skip_folder(4, 8) + "ab.safetensors")
    bad = ["skips/8-4.json", "skips/0000000004-0000000008.json", "skips/0000000008-0000000004", "skips/x", "objects/1"]
    assert all(skip_of_key(key) is None for key in bad)


# --- catching up ---------------------------------------------------------------------------------------------------


def test_a_late_consumer_takes_a_skip_delta_and_holds_the_same_bits(chain: tuple[MemoryStore, list[State]]) -> None:
    store, states = chain
    seen = FaultyStore(copy_of(store), [])
    result = advance(seen, states[:18], 2)
    assert result.path == "delta"
    assert result.hops == 4  # 2 -> 4 -> 8 -> 16 -> 18
    assert len([key for key in reads(seen, "skips/") if key.endswith(".json")]) == 4
    assert len(set(reads(seen, "manifests/"))) < 14  # not those that the way leads past


@given(have=st.integers(1, 18), target=st.integers(1, 18))
@settings(max_examples=25)
def test_from_anywhere_to_anywhere_bit_for_bit(chain: tuple[MemoryStore, list[State]], have: int, target: int) -> None:
    store, states = chain
    have, target = sorted((have, target))
    consumer, model = at(store, states, have)
    assert same(model, states[have - 1])
    if target > have:
        manifest = consumer._manifest(target)
        result = consumer._apply(manifest, None, model, None)
        assert (result.version, result.digest) == (target, manifest.state)
        assert same(model, states[target - 1])


def test_skip_deltas_save_bytes_and_single_steps_never_ask_for_them(chain: tuple[MemoryStore, list[State]]) -> None:
    store, states = chain
    plain = MemoryStore()
    for key in keys(store) - keys(store, "skips/"):
        plain.put(key, [store.get(key, size_max=1 << 30)])
    assert advance(store, states, 2).bytes_fetched < advance(plain, states, 2).bytes_fetched / 2
    seen = FaultyStore(copy_of(store), [])
    advance(seen, states, 17)
    assert not [op for op in seen.log[seen.log.index(next(o for o in seen.log if o.key == manifest_key(18))) :]
                if op.key.startswith("skips/")]  # fmt: skip


def test_a_newcomer_takes_them_from_the_anchor_on(chain: tuple[MemoryStore, list[State]]) -> None:
    store, states = chain
    model = {name: torch.empty_like(tensor) for name, tensor in states[0].items()}
    result = Consumer(store, threads=1).load(model)
    assert result.hops < 8
    assert same(model, states[-1])


# --- making them ---------------------------------------------------------------------------------------------------


def test_compacting_again_or_after_being_stopped_goes_on(chain: tuple[MemoryStore, list[State]]) -> None:
    store, states = chain
    whole = keys(store, "skips/")
    assert len(whole) == 2 * sum(len(list(ladder(v))) for v in range(1, 19))
    stopped = MemoryStore()
    for key in keys(store) - whole:
        stopped.put(key, [store.get(key, size_max=1 << 30)])
    faulty = FaultyStore(stopped, [Fault("create", 7, "unavailable", times=1000)])
    with pytest.raises(RetryError):
        compact(faulty, retry_s=0, threads=1)
    before = {key for key in keys(stopped, "skips/") if key.endswith(".json")}
    assert before
    report = compact(stopped, threads=1)
    assert report.kept == len(before)
    assert {k for k in keys(stopped, "skips/") if k.endswith(".json")} == {k for k in whole if k.endswith(".json")}
    again = compact(stopped, threads=1)
    assert (again.written, again.kept) == ((), len(whole) // 2)
    advance(stopped, states, 3)


def test_dense_skip_deltas_lead_from_anywhere_in_one_hop() -> None:
    store = MemoryStore()
    states = publish(store, 13)
    report = compact(store, kind="dense", threads=1)
    assert {(r.base, r.version) for r in report.written} == {
        (v - span, v) for v in range(1, 14) for span in (2, 4, 8) if v > span
    }
    assert [advance(store, states, have).hops for have in (5, 9)] == [1, 1]
    with pytest.raises(MisuseError, match="dense"):
        compact(store, kind="all")


def test_a_dry_run_tells_and_writes_nothing(chain: tuple[MemoryStore, list[State]]) -> None:
    store = MemoryStore()
    publish(store, 8)
    before = keys(store)
    report = compact(store, dry_run=True)
    assert [(r.base, r.version) for r in report.written] == [(2, 4), (4, 6), (6, 8), (4, 8)]
    assert keys(store) == before
    assert [(r.base, r.version) for r in compact(store).written] == [(2, 4), (4, 6), (6, 8), (4, 8)]


def test_a_lost_reply_leaves_one_record(chain: tuple[MemoryStore, list[State]]) -> None:
    inner = MemoryStore()
    states = publish(inner, 4)
    faulty = FaultyStore(inner, [Fault("create", 1, "lost-reply"), Fault("create", 3, "lost-reply")])
    report = compact(faulty, retry_s=5, threads=1)
    assert [(r.base, r.version) for r in report.written] == [(2, 4)]
    assert len(keys(inner, "skips/")) == 2
    advance(inner, states, 2)


def test_two_compactors_at_once_do_no_harm() -> None:
    store = MemoryStore()
    states = publish(store, 16)
    threads = [threading.Thread(target=compact, args=(store,), kwargs={"threads": 1}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [key for key in keys(store, "skips/") if key.endswith(".json")]
    assert len(records) == sum(len(list(ladder(v))) for v in range(1, 17))
    assert advance(store, states, 8).hops == 1
    report = collect(store, keep_last=16, grace_s=0, now_s=time.time() + 1e6)
    assert len(keys(store, "skips/")) == 2 * len(records)  # what the slower ones uploaded is gone
    assert all(info.key.endswith(".safetensors") for info in report.deleted)
    assert advance(store, states, 8).hops == 1


@pytest.mark.parametrize("values", ["ulp", "absolute"])
def test_the_publisher_writes_them_behind_its_back(values: str) -> None:
    store = MemoryStore()
    states = publish(store, 3, values=values)
    generator = torch.Generator().manual_seed(5)
    state = {name: tensor.clone() for name, tensor in states[-1].items()}
    with Publisher(store, threads=1, skips="ladder", values=values, anchor_ratio=100.0) as publisher:
        for step in range(3, 9):
            state["w"][torch.rand(20_000, generator=generator) < 0.01] *= 1.01
            publisher.publish(state, step=step)
            states.append({name: tensor.clone() for name, tensor in state.items()})
        report = publisher.compact()
    assert report.written == ()
    assert report.kept == sum(len(list(ladder(v))) for v in range(1, 10))
    assert advance(store, states, 4).hops == 2


def test_the_publisher_goes_on_when_skip_deltas_fail(caplog: pytest.LogCaptureFixture) -> None:
    class Refuses(FaultyStore):
        def create(self, key: str, data: object) -> None:
            if key.startswith("skips/"):
                raise RuntimeError("no")
            super().create(key, data)  # type: ignore[arg-type]

    store = MemoryStore()
    state = {"w": torch.zeros(50)}
    states = []
    publisher = Publisher(Refuses(store, []), threads=1, skips="ladder", anchor_ratio=100.0)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            state["w"][step] += 1
            publisher.publish(state)
            states.append({"w": state["w"].clone()})
        assert publisher._skips is not None
        publisher._skips.wait()
    publisher.close()
    assert "no skip deltas to version 4: no" in caplog.text
    advance(store, states, 1)


def test_chains_in_context_are_compacted_with_one_state_walked_along() -> None:
    store, states = MemoryStore(), []
    with Publisher(store, level="smallest", threads=1, anchor_ratio=100.0) as publisher:
        for seed in range(9):
            states.append(lively({}, 0 if seed == 0 else seed))
            publisher.publish(states[-1])
    assert in_context(Patch.parse(Compactor(store).remote.fetch(manifest_of(store, 5).deltas[0].object, "blake3")))
    report = compact(store, threads=1)
    assert (4, 8) in {(r.base, r.version) for r in (*report.written, *report.useless)}
    assert not report.impossible
    assert report.written
    assert advance(store, states, 1).hops < 8


def test_tensors_that_come_and_go_are_left_out_or_exact() -> None:
    store, states = MemoryStore(), []
    with Publisher(store, threads=1, anchor_ratio=100.0) as publisher:
        for k in range(8):
            state = {"w": torch.randn(2000, generator=torch.Generator().manual_seed(1))}
            state["w"][k] += 1
            if k >= 4:
                state["new"] = torch.arange(500.0) + k
            states.append(state)
            publisher.publish(state)
    report = compact(store, threads=1)
    assert report.written
    for version in range(1, 9):
        held = Consumer(store, threads=1).fetch(version=version)
        found = {n: tensor_of(held.cells[n], x.dtype.name, x.shape) for n, x in held.layouts.items()}
        assert same(found, states[version - 1])


def test_misuse_is_told() -> None:
    with pytest.raises(MisuseError, match="ladder"):
        Publisher(MemoryStore(), skips="all")  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="no versions"):
        compact(MemoryStore())


# --- collecting garbage --------------------------------------------------------------------------------------------


def test_collecting_keeps_skips_between_versions_that_stay() -> None:
    store = MemoryStore()
    states = publish(store, 18, anchor_every=7)  # anchors at 1, 8, 15
    compact(store, threads=1)
    report = collect(store, keep_last=8, grace_s=3600, now_s=time.time() + 4000)
    left = {skip_of_key(key) for key in keys(store, "skips/")}
    assert (8, 16) in left
    assert not {pair for pair in left if pair is not None and pair[0] < 8}
    assert report.kept == tuple(range(11, 19))
    for version in report.kept:
        assert same_as(Consumer(store, threads=1).fetch(version=version), states[version - 1])
    advance(store, states, 11)
    for key in keys(store, "skips/"):  # no kept version rests on one
        store.delete(key)
    for version in report.kept:
        assert same_as(Consumer(store, threads=1).fetch(version=version), states[version - 1])


def same_as(held: object, state: State) -> bool:
    cells, layouts = held.cells, held.layouts  # type: ignore[attr-defined]
    return same({n: tensor_of(cells[n], x.dtype.name, x.shape) for n, x in layouts.items()}, state)


def test_the_young_are_spared_and_others_files_are_left_alone(chain: tuple[MemoryStore, list[State]]) -> None:
    store = copy_of(chain[0])
    store.put("skips/readme.txt", [b"mine"])
    store.put(skip_folder(8, 16) + "ff.safetensors", [b"on its way"])
    before = keys(store, "skips/")
    collect(store, keep_last=18, grace_s=3600, now_s=time.time())
    assert keys(store, "skips/") == before
    collect(store, keep_last=18, grace_s=0, now_s=time.time() + 10)
    assert before - keys(store, "skips/") == {skip_folder(8, 16) + "ff.safetensors"}


def test_a_remote_without_skips_sees_none() -> None:
    store = MemoryStore()
    publish(store, 3)
    assert Remote(store, retry_s=0).skip_hints(1, 3) == {}

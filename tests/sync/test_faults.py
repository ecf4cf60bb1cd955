"""Faults at every point: nothing lost, nothing mixed, and the next run recovers by itself."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import thinwire
from tests.sync.models import bits, nudge, small_model
from thinwire.errors import NoPathError, RetryError, ThinwireError, UntrustedError
from thinwire.stores.memory import MemoryStore
from thinwire.stores.protocol import Store
from thinwire.sync.remote import HINT_KEY
from thinwire.testing.faults import Fault, FaultyStore, Operation, SimulatedCrash
from thinwire.wire.manifest import manifest_key


def published(store: Store, versions: int, **options: object) -> list[dict[str, bytes]]:
    """Publish some versions; the bits of each."""
    model = small_model()
    publisher = thinwire.Publisher(store, **options)  # type: ignore[arg-type]
    states = []
    for step in range(versions):
        nudge(model, step)
        publisher.publish(model, step=step)
        states.append(bits(model))
    return states


def versions_of(store: Store) -> dict[int, str]:
    """Every committed version's digest, proved by building it."""
    consumer = thinwire.Consumer(store, retry_s=0)
    newest = consumer.fetch(timeout_s=0)
    return {v: consumer.fetch(version=v).digest for v in range(1, newest.version + 1)}


# --- the publisher dies --------------------------------------------------------------------------------------------


WRITES_OF_TWO = 3 + 3 + 3  # the probe aside: tree, anchor or delta, manifest; hint


@pytest.mark.parametrize("when", ["crash-before", "crash-after"])
@pytest.mark.parametrize("nth", range(1, WRITES_OF_TWO))
def test_publisher_killed_at_every_write(nth: int, when: str) -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, [Fault("write", nth, when)])  # type: ignore[arg-type]
    model = small_model()
    publisher = thinwire.Publisher(store, single_publisher=True, anchor_every=2)
    believed: dict[int, str] = {}
    try:
        for step in range(3):
            nudge(model, step)
            report = publisher.publish(model, step=step)
            believed[report.version] = report.digest
    except SimulatedCrash:
        pass
    assert store.crashed
    again = thinwire.Publisher(inner)
    nudge(model, 10)
    report = again.publish(model, step=10)
    chain = versions_of(inner)
    assert believed.items() <= chain.items()  # what was reported as published is there
    assert len(chain) <= len(believed) + 2
    assert chain[report.version] == report.digest
    worker = small_model(5)
    assert thinwire.Consumer(inner).load(worker).version == report.version
    assert bits(worker) == bits(model)


@pytest.mark.parametrize("kind", ["unavailable", "lost-reply"])
@pytest.mark.parametrize("nth", range(1, WRITES_OF_TWO))
def test_a_write_that_fails_once_is_made_good(nth: int, kind: str) -> None:
    inner = MemoryStore()
    states = published(
        FaultyStore(inner, [Fault("write", nth, kind)]),
        3,
        single_publisher=True,
        anchor_every=2,
        retry_s=30,  # type: ignore[arg-type]
    )
    worker = small_model(5)
    consumer = thinwire.Consumer(inner)
    for version, state in enumerate(states, 1):
        consumer.load(worker, version=version)
        assert bits(worker) == state


def test_a_store_that_is_down_for_long_loses_nothing() -> None:
    inner = MemoryStore()
    down = threading.Event()

    def rule(operation: Operation) -> str | None:
        return "unavailable" if down.is_set() else None

    store = FaultyStore(inner, rule)  # type: ignore[arg-type]
    model = small_model()
    publisher = thinwire.Publisher(store, single_publisher=True, retry_s=0.05)
    publisher.publish(model)
    down.set()
    nudge(model, 1)
    with pytest.raises(RetryError):
        publisher.publish(model, step=1)
    first = bits(model)
    nudge(model, 2)
    with pytest.raises(RetryError):
        publisher.publish(model, step=2)
    down.clear()
    report = publisher.publish(model, step=3)
    assert report.version == 3
    worker = small_model(3)
    consumer = thinwire.Consumer(inner)
    consumer.load(worker, version=2)
    assert bits(worker) == first
    consumer.load(worker)
    assert bits(worker) == bits(model)


def test_a_background_publish_that_failed_goes_out_with_the_next() -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, [Fault("put", 4, "unavailable", times=6)])
    model = small_model()
    publisher = thinwire.Publisher(store, single_publisher=True, retry_s=0)
    publisher.publish(model)
    nudge(model, 1)
    future = publisher.publish(model, step=1, wait=False)
    with pytest.raises(RetryError):
        future.result(30)
    for _ in range(2):  # two objects an attempt
        with pytest.raises(RetryError):
            publisher.flush()
    report = publisher.flush()
    assert report is not None
    assert report.version == 2
    publisher.close()


# --- the consumer meets damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["short", "flip", "swap", "missing", "unavailable"])
@pytest.mark.parametrize("nth", range(1, 10))
def test_one_bad_reply_while_loading_does_no_harm(nth: int, kind: str) -> None:
    inner = MemoryStore()
    states = published(inner, 4)
    store = FaultyStore(inner, [Fault("get", nth, kind)])  # type: ignore[arg-type]
    worker = small_model(5)
    result = thinwire.Consumer(store, poll_s=0.01).load(worker)
    assert bits(worker) == states[result.version - 1]
    assert result.version == 4 or kind == "missing"  # a replica that lags may show an older version


@pytest.mark.parametrize("kind", ["short", "flip", "swap", "missing", "unavailable"])
@pytest.mark.parametrize("nth", range(1, 8))
def test_one_bad_reply_while_following_does_no_harm(nth: int, kind: str) -> None:
    inner = MemoryStore()
    states = published(inner, 5, anchor_every=3)
    worker = small_model(5)
    reads = 0
    armed = False

    def rule(operation: Operation) -> str | None:
        nonlocal reads
        reads += armed and operation.verb == "get"
        return kind if armed and reads == nth else None

    consumer = thinwire.Consumer(FaultyStore(inner, rule), poll_s=0.01)  # type: ignore[arg-type]
    consumer.load(worker, version=1)
    armed = True
    for version in consumer.follow(timeout_s=0.05):
        version.apply(worker)
        assert bits(worker) == states[(consumer.version or 0) - 1]
    assert consumer.version == 5


def corrupt(store: MemoryStore, key: str, how: str) -> None:
    data = bytearray(store.get(key, size_max=1 << 30))
    if how == "missing":
        store.delete(key)
        return
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[len(data) // 2] ^= 1
    elif how == "longer":
        data += b"x"
    else:
        data = bytearray(b"")
    store.put(key, [bytes(data)])


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "longer", "empty"])
@pytest.mark.parametrize("held", [None, 1, 4])
def test_a_damaged_delta_is_gone_around_by_the_anchor(how: str, held: int | None) -> None:
    store = MemoryStore()
    states = published(store, 6, anchor_every=3)  # anchors at 1, 4
    deltas = sorted(i.key for i in store.list("objects/") if "delta" in i.key)
    corrupt(store, deltas[2], how)  # 3 -> 4
    worker = small_model(5)
    consumer = thinwire.Consumer(store, poll_s=0.01)
    if held is None:
        consumer.load(worker)
    else:
        consumer.load(worker, version=held)
        version = consumer.poll()
        assert version is not None
        version.apply(worker)
    assert bits(worker) == states[5]


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "longer", "empty"])
def test_a_damaged_anchor_is_gone_around_by_the_one_before(how: str) -> None:
    store = MemoryStore()
    states = published(store, 6, anchor_every=3)
    anchors = sorted(i.key for i in store.list("objects/") if "model" in i.key)
    corrupt(store, anchors[1], how)
    worker = small_model(5)
    result = thinwire.Consumer(store).load(worker)
    assert result.hops == 5
    assert bits(worker) == states[5]


def test_without_any_way_nothing_is_touched_and_the_reason_is_told() -> None:
    store = MemoryStore()
    published(store, 3)
    for info in list(store.list("objects/")):
        if "model" in info.key:
            corrupt(store, info.key, "flipped")
    worker = small_model(5)
    before = bits(worker)
    with pytest.raises(NoPathError, match="digest"):
        thinwire.Consumer(store).load(worker)
    assert bits(worker) == before


def test_a_broken_way_stops_at_a_whole_version_and_goes_on_when_mended() -> None:
    store = MemoryStore()
    states = published(store, 4)
    deltas = sorted(i.key for i in store.list("objects/") if "delta" in i.key)
    good = store.get(deltas[2], size_max=1 << 20)
    worker, consumer = small_model(5), thinwire.Consumer(store, poll_s=0.01)
    consumer.load(worker, version=2)
    corrupt(store, deltas[2], "flipped")
    version = consumer.poll()
    assert version is not None
    with pytest.raises(NoPathError):
        version.apply(worker)
    assert bits(worker) == states[(consumer.version or 0) - 1]
    store.put(deltas[2], [good])
    fresh = thinwire.Consumer(store)
    fresh.load(worker)
    assert bits(worker) == states[3]


def test_a_swapped_manifest_is_refused() -> None:
    store = MemoryStore()
    published(store, 4)
    store.put(manifest_key(4), [store.get(manifest_key(3), size_max=1 << 20)])
    with pytest.raises(UntrustedError, match="version 4"):
        thinwire.Consumer(store).load(small_model(1))


def test_a_rewritten_history_is_refused_by_who_has_seen_it() -> None:
    store, other = MemoryStore(), MemoryStore()
    published(store, 3)
    worker, consumer = small_model(5), thinwire.Consumer(store, poll_s=0.01)
    consumer.load(worker)
    held = bits(worker)
    model = small_model(77)
    publisher = thinwire.Publisher(other)
    for step in range(4):
        nudge(model, step)
        publisher.publish(model)
    for info in list(other.list("")):
        store.put(info.key, [other.get(info.key, size_max=1 << 20)])
    with pytest.raises(UntrustedError):
        consumer.poll()
    assert bits(worker) == held


def test_a_rollback_is_refused_after_a_restart() -> None:
    store = MemoryStore()
    published(store, 3)
    store.delete(manifest_key(3))
    store.put(HINT_KEY, [b'{"version":2}'])
    with pytest.raises(UntrustedError, match="rollback"):
        thinwire.Consumer(store, floor=3, poll_s=0.01).load(small_model(1), timeout_s=0.05)


@pytest.mark.parametrize("hint", [b"", b"{}", b'{"version":1}', b'{"version":999}', b'{"version":-3}', b"\xff" * 5000])
def test_whatever_the_hint_says_the_newest_version_is_found(hint: bytes) -> None:
    store = MemoryStore()
    published(store, 4)
    store.put(HINT_KEY, [hint])
    assert thinwire.Consumer(store).load(small_model(1)).version == 4


def test_stale_listings_do_not_hide_versions() -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, [Fault("list", 1, "stale", times=10**6)], stale_writes=3)
    states = published(store, 4, single_publisher=True)
    worker = small_model(1)
    consumer = thinwire.Consumer(store, poll_s=0.01)
    consumer.load(worker)
    assert consumer.version == 4
    assert bits(worker) == states[3]


# --- anything, anywhere --------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.05, 0.2, 0.5]))
def test_random_faults_never_mix_states(seed: int, share: float) -> None:
    """Publisher and consumer over a store that misbehaves at random: the worker is always at some whole version."""
    kinds = ["unavailable", "lost-reply", "missing", "short", "flip", "swap"]

    def rule(operation: Operation) -> str | None:
        chance = random.Random(f"{seed} {operation.index}")  # several threads ask
        if operation.verb == "list":
            return chance.choice(["unavailable", "stale"]) if chance.random() < share else None
        return chance.choice(kinds) if chance.random() < share else None

    inner = MemoryStore()
    model, worker = small_model(), small_model(5)
    states: dict[int, dict[str, bytes]] = {}
    publisher = thinwire.Publisher(inner, anchor_every=3)
    consumer = thinwire.Consumer(FaultyStore(inner, rule), retry_s=0.01, poll_s=0.001)  # type: ignore[arg-type]
    for step in range(6):
        nudge(model, step)
        states[publisher.publish(model).version] = bits(model)
        try:
            if consumer.version is None:
                consumer.load(worker, timeout_s=0)
            else:
                version = consumer.poll()
                if version is not None:
                    version.apply(worker)
        except ThinwireError:
            pass
        if consumer.version is not None:
            assert bits(worker) == states[consumer.version]
    healthy = thinwire.Consumer(inner)
    healthy.load(worker)
    assert bits(worker) == states[6]

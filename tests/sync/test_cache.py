"""Consumers that share a cache: it may be damaged, old or lie, and the model is still what was published."""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import thinwire
from tests.sync.models import bits, nudge, small_model
from tests.trust.scenes import document, follower, key, pinned, publish, rotated
from thinwire.crypto import SigningKey
from thinwire.stores.cached import CachedStore
from thinwire.stores.local import LocalStore
from thinwire.stores.memory import MemoryStore
from thinwire.stores.shelf import _HEAD
from thinwire.sync.guard import Guard, put_heartbeat
from thinwire.sync.trust import Trust, publish_document
from thinwire.testing.faults import Fault, FaultyStore
from thinwire.wire.manifest import Manifest, manifest_key
from thinwire.wire.signing import public_text

HEAD = _HEAD.size


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "v1" / "entries").rglob("*") if path.is_file())


def lie(path: Path, body: bytes) -> None:
    """Give an entry another body, with a head that agrees: as a damaged large one, or one that somebody wrote."""
    magic, kind, asked_s, _, name, _ = _HEAD.unpack(path.read_bytes()[:HEAD])
    head = _HEAD.pack(magic, kind, asked_s, len(body), name, hashlib.sha256(body).digest())
    path.write_bytes(head + body)


def followed(tmp_path: Path, **options: object) -> tuple[thinwire.Publisher, FaultyStore, torch.nn.Module]:
    origin = FaultyStore(MemoryStore())
    publisher, model = thinwire.Publisher(origin.inner, anchor_ratio=100, **options), small_model()  # type: ignore[arg-type]
    publisher.publish(model)
    return publisher, origin, model


def test_ten_workers_of_one_machine_fetch_each_version_once(tmp_path: Path) -> None:
    publisher, origin, model = followed(tmp_path)
    workers = [thinwire.Consumer(origin, poll_s=0.8, cache=tmp_path) for _ in range(10)]
    served = [small_model(seed) for seed in range(1, 11)]
    for consumer, target in zip(workers, served, strict=True):
        consumer.load(target)
    objects = [operation.key for operation in origin.log if operation.key.startswith(("objects/", "manifests/0"))]
    assert len(objects) == len(set(objects))
    before = len(origin.log)
    nudge(model, seed=1)
    publisher.publish(model)
    time.sleep(0.25)  # that it is absent is shared for a quarter of the poll interval
    for consumer, target in zip(workers, served, strict=True):
        version = consumer.poll()
        assert version is not None
        version.apply(target)
        assert bits(target) == bits(model)
    asked = [operation.key for operation in origin.log[before:]]
    assert sum(key.startswith("objects/") for key in asked) == 1
    assert asked.count("manifests/0000000002.json") == 1


@settings(max_examples=12)
@given(draw=st.randoms(use_true_random=True))
def test_whatever_the_cache_holds_the_model_is_what_was_published(
    draw: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    publisher, origin, model = followed(folder)
    thinwire.Consumer(origin, poll_s=100, cache=folder).load(small_model(5))
    nudge(model, seed=1)
    publisher.publish(model)
    other = thinwire.Consumer(origin, poll_s=0.001, cache=folder)
    other.load(small_model(6))
    found = entries(folder)
    for path in draw.sample(found, draw.randint(1, min(4, len(found)))):
        raw = bytearray(path.read_bytes()[HEAD:])
        if raw:
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        swapped = draw.choice(found).read_bytes()[HEAD:]
        lie(path, draw.choice([bytes(raw), bytes(raw[: len(raw) // 2]), swapped, b""]))
    served = small_model(7)
    consumer = thinwire.Consumer(origin, poll_s=0.001, cache=folder, trust=None, retry_s=1.0)
    try:
        consumer.load(served)
    except thinwire.ThinwireError:  # a manifest without a signature may lie in a way that only its successor shows
        assert bits(served) == bits(small_model(7))
        return
    assert consumer.digest in {manifest.state for manifest in consumer._remote.chain.manifests.values()}
    assert bits(served) == bits(model) or consumer.version == 1


@settings(max_examples=12)
@given(draw=st.randoms(use_true_random=True))
def test_with_pinned_keys_no_lie_in_the_cache_keeps_a_worker_from_the_newest_version(
    draw: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, signer = tmp_path_factory.mktemp("cache"), SigningKey.generate()
    (folder / "key.pub").write_text(public_text(signer.public))
    publisher, origin, model = followed(folder, key=signer)
    nudge(model, seed=1)
    publisher.publish(model)
    nudge(model, seed=2)
    publisher.publish(model)
    thinwire.Consumer(origin, poll_s=0.001, cache=folder, trust=folder / "key.pub").load(small_model(5))  # type: ignore[arg-type]
    for path in entries(folder):
        raw = bytearray(path.read_bytes()[HEAD:])
        if raw and draw.random() < 0.5:
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            lie(path, bytes(raw))
    served = small_model(7)
    consumer = thinwire.Consumer(origin, poll_s=0.001, cache=folder, trust=folder / "key.pub")  # type: ignore[arg-type]
    assert consumer.load(served).version == 3
    assert bits(served) == bits(model)


def test_an_old_version_in_the_cache_is_not_the_newest(tmp_path: Path) -> None:
    """A cache that somebody puts back as it was a day ago holds old answers, whose time is over."""
    publisher, origin, model = followed(tmp_path)
    thinwire.Consumer(origin, cache=tmp_path / "cache").load(small_model(5))
    kept = {path: path.read_bytes() for path in entries(tmp_path / "cache")}
    nudge(model, seed=1)
    publisher.publish(model)
    for path, raw in kept.items():
        magic, kind, asked_s, size, name, digest = _HEAD.unpack(raw[:HEAD])
        path.write_bytes(_HEAD.pack(magic, kind, asked_s - 86400, size, name, digest) + raw[HEAD:])
    served = small_model(7)
    assert thinwire.Consumer(origin, cache=tmp_path / "cache").load(served).version == 2
    assert bits(served) == bits(model)


def test_another_run_in_the_same_place_is_found_out_after_a_minute(tmp_path: Path) -> None:
    origin = LocalStore(tmp_path / "store", fsync=False)
    first, second = small_model(1), small_model(2)
    thinwire.Publisher(origin).publish(first)
    thinwire.Consumer(origin, cache=tmp_path / "cache").load(small_model(5))
    for info in list(origin.list("")):
        origin.delete(info.key)
    thinwire.Publisher(origin).publish(second)
    for path in entries(tmp_path / "cache"):  # as if it had been then
        raw = path.read_bytes()
        magic, kind, asked_s, size, name, digest = _HEAD.unpack(raw[:HEAD])
        path.write_bytes(_HEAD.pack(magic, kind, asked_s - 61, size, name, digest) + raw[HEAD:])
    served = small_model(7)
    thinwire.Consumer(origin, cache=tmp_path / "cache").load(served)
    assert bits(served) == bits(second)


def test_a_trust_document_that_was_damaged_on_the_way_is_asked_for_again(tmp_path: Path) -> None:
    """Whoever gets a bad copy has it dropped, so that the second ask goes to the origin."""
    inner, first = MemoryStore(), document()
    for held in (first, rotated(first, [0, 1])):
        publish_document(inner, held, retry_s=1.0)
    publish(inner, 2, keys=[1], trust=Trust(first))
    origin = FaultyStore(inner, [Fault("get", 1, "flip", key="trust/")])
    consumer, served = follower(origin, Trust(first), poll_s=100, cache=tmp_path)
    assert consumer.load(served).version == 2
    asked = [operation.fault for operation in origin.log if operation.key == "trust/0000000002.json"]
    assert asked == ["flip", None]


def test_a_heartbeat_that_was_damaged_on_the_way_is_asked_for_again(tmp_path: Path) -> None:
    inner = MemoryStore()
    publish(inner, 1)
    newest = replace(Manifest.parse(inner.get(manifest_key(1), size_max=1 << 20)), facts={})  # of an unknown time
    put_heartbeat(inner, newest, [key(0)], retry_s=1.0)
    origin = FaultyStore(inner, [Fault("get", 1, "flip", key="heartbeat")])
    store = CachedStore(origin, tmp_path, fresh_s=100)
    assert Guard(store, pinned(0, max_age_s=600.0), None, retry_s=1.0).check_fresh(newest, lambda _: None) == newest
    assert [operation.fault for operation in origin.log] == ["flip", None]

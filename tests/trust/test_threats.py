"""One test for each threat of docs/trust.md, named after it: who can do what, and what a consumer says to it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trust.scenes import (
    copy_of,
    document,
    follower,
    forge,
    key,
    manifest_of,
    pinned,
    public,
    publish,
    rotated,
    same,
    stored,
    truncated,
)
from thinwire import Publisher
from thinwire.errors import DamagedObjectError, MisuseError, NoPathError, UntrustedError
from thinwire.stores.encrypted import EncryptedStore
from thinwire.stores.memory import MemoryStore
from thinwire.sync.compactor import compact
from thinwire.sync.guard import put_heartbeat
from thinwire.sync.trust import Memory, Trust, next_document, now_ms
from thinwire.wire.manifest import manifest_key
from thinwire.wire.signing import sign
from thinwire.wire.skip import Skip, skip_key
from thinwire.wire.trust import HEARTBEAT_KEY, Heartbeat, trust_key

HOUR_MS = 3_600_000


@pytest.fixture
def store() -> MemoryStore:
    """Three versions, signed by key 0."""
    made = MemoryStore()
    publish(made, 3)
    return made


def refused(store: MemoryStore, trust: object, match: str, **how: object) -> None:
    """A newcomer refuses, and its model is as it was."""
    consumer, model = follower(store, trust, **how)
    with pytest.raises(UntrustedError, match=match):
        consumer.load(model, timeout_s=0)
    assert same(model, {"w": torch.zeros(64)})
    assert consumer.version is None


# --- somebody who may write to the store, and holds no key -----------------------------------------------------------


def test_a_writer_without_a_key_publishes_a_version(store: MemoryStore) -> None:
    model = publish(store, 0)
    consumer, held = follower(store, pinned())
    consumer.load(held)
    before = {name: tensor.clone() for name, tensor in held.items()}
    publish(store, 1, model=model, keys=(), anchor_every=1)
    with pytest.raises(UntrustedError, match="not signed"):
        consumer.poll()
    assert same(held, before)
    refused(store, pinned(), "not signed")


def test_a_store_lies_about_a_manifest(store: MemoryStore) -> None:
    forge(store, 2, state="ab" * 32)
    refused(store, pinned(), "not signed")
    signatures = manifest_of(store, 3).signatures
    forge(store, 3, keys=())
    store.put(manifest_key(3), [replace(manifest_of(store, 3), step=7, signatures=signatures).encode()])
    refused(store, pinned(), "signed|wrong")


def test_a_man_in_the_middle_alters_a_signed_manifest(store: MemoryStore) -> None:
    good = manifest_of(store, 3)
    store.put(manifest_key(3), [replace(good, metadata={"trust": "me"}).encode()])
    refused(store, pinned(), "wrong signature")


def test_a_stranger_signs_with_a_key_of_his_own(store: MemoryStore) -> None:
    forge(store, 1, keys=(1,))
    refused(store, pinned(), "unknown, revoked")


def test_an_anchor_is_swapped_for_another_one(store: MemoryStore) -> None:
    other = MemoryStore()
    publish(other, 1, model={"w": torch.full((64,), 9.0)})
    theirs = other.get(manifest_of(other, 1).anchor[0].key, size_max=1 << 20)
    store.put(manifest_of(store, 1).anchor[0].key, [theirs])
    consumer, model = follower(store, pinned())
    with pytest.raises(NoPathError):
        consumer.load(model)
    assert same(model, {"w": torch.zeros(64)})


def test_an_object_is_cut_off(store: MemoryStore) -> None:
    ref = manifest_of(store, 3).deltas[0].object
    store.put(ref.key, [store.get(ref.key, size_max=ref.size)[:-1]])
    consumer, model = follower(store, pinned())
    with pytest.raises(NoPathError):
        consumer.load(model)
    assert consumer.load(model, version=2).version == 2


def test_a_skip_delta_leads_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    model = publish(store, 9)
    compact(store, threads=1)
    record = Skip.parse(store.get(skip_key(4, 8), size_max=1 << 20))
    store.put(record.object.key, [b"x" * record.object.size])
    consumer, held = follower(store, pinned())
    assert consumer.load(held).version == 9
    assert same(held, model)


def test_skip_deltas_are_written_by_somebody_without_a_key() -> None:
    """They prove nothing, so they may: the state's digest, which is signed, decides. Unless one insists."""
    store = MemoryStore()
    model = publish(store, 9)
    compact(store, threads=1)
    easy, held = follower(store, pinned())
    easy.load(held, version=2)
    used = easy.poll().apply(held)  # type: ignore[union-attr]
    assert used.hops < 7
    strict, other = follower(store, pinned(signed_skips=True))
    strict.load(other, version=2)
    assert strict.poll().apply(other).hops == 7  # type: ignore[union-attr]
    assert same(held, model)
    assert same(other, model)
    for info in list(store.list("skips/")):
        store.delete(info.key)
    compact(store, threads=1, key=key(0))
    strict, other = follower(store, pinned(signed_skips=True))
    strict.load(other, version=2)
    assert strict.poll().apply(other).hops == used.hops  # type: ignore[union-attr]


def test_another_run_of_the_same_publisher_is_passed_off_as_this_one() -> None:
    here, there = MemoryStore(), MemoryStore()
    publish(here, 1, trust=document(chain="run-7"))
    publish(there, 2, trust=document(chain="run-8"))
    consumer, model = follower(here, document(chain="run-7"))
    assert consumer.load(model).version == 1
    refused(there, document(chain="run-7"), "run-8")


# --- somebody who replays ------------------------------------------------------------------------------------------


def test_a_mirror_replays_an_old_version_after_a_restart(store: MemoryStore, tmp_path: Path) -> None:
    consumer, model = follower(store, pinned(), memory=tmp_path / "seen.json")
    assert consumer.load(model).version == 3
    refused(truncated(store, 2), pinned(), "rollback", memory=tmp_path / "seen.json")
    again, model = follower(store, pinned(), memory=tmp_path / "seen.json")
    assert again.load(model).version == 3


def test_a_publisher_shows_two_histories(store: MemoryStore, tmp_path: Path) -> None:
    """A fork, by somebody who holds the key: whoever has seen one side refuses the other."""
    other = copy_of(store)
    forge(other, 3, keys=(0,), step=99)
    consumer, model = follower(store, pinned(), memory=tmp_path / "seen.json")
    consumer.load(model)
    refused(other, pinned(), "fork", memory=tmp_path / "seen.json")
    publish(other, 1)
    refused(other, pinned(), "fork", memory=tmp_path / "seen.json")
    other.delete(manifest_key(3))
    refused(other, pinned(), "no longer shows|does not show", memory=tmp_path / "seen.json")


def test_a_mirror_is_frozen(store: MemoryStore) -> None:
    forge(store, 3, keys=(0,), facts={"created_ms": now_ms() - 2 * HOUR_MS})
    assert follower(store, pinned())[0].load({"w": torch.zeros(64)}).version == 3
    refused(store, pinned(max_age_s=3600), "frozen")
    put_heartbeat(store, manifest_of(store, 3), [key(0)], retry_s=0)
    consumer, model = follower(store, pinned(max_age_s=3600))
    assert consumer.load(model).version == 3
    assert consumer.poll() is None
    old = Heartbeat(3, manifest_of(store, 3).digest, now_ms() - HOUR_MS - 1)
    store.put(HEARTBEAT_KEY, [replace(old, signatures=sign(old.signed(), [key(0)])).encode()])
    refused(store, pinned(max_age_s=3600), "frozen")


def test_a_mirror_freezes_while_it_is_followed(store: MemoryStore) -> None:
    consumer, model = follower(store, pinned(max_age_s=0.3))
    put_heartbeat(store, manifest_of(store, 3), [key(0)], retry_s=0)
    consumer.load(model)
    time.sleep(0.4)
    with pytest.raises(UntrustedError, match="frozen"):
        consumer.poll()
    put_heartbeat(store, manifest_of(store, 3), [key(0)], retry_s=0)
    assert consumer.poll() is None


def test_versions_are_withheld(store: MemoryStore) -> None:
    forge(store, 2, keys=(0,), facts={"created_ms": now_ms() - 2 * HOUR_MS})
    put_heartbeat(store, manifest_of(store, 3), [key(0)], retry_s=0)
    refused(truncated(store, 2), pinned(max_age_s=3600), "withheld")


def test_a_heartbeat_is_forged_or_names_another_history(store: MemoryStore) -> None:
    forge(store, 1, keys=(0,), facts={"created_ms": 0})
    forge(store, 3, keys=(0,), facts={"created_ms": 0})
    newest = manifest_of(store, 3)
    trust = pinned(max_age_s=3600)
    for signers, beat, match in (
        ([key(1)], Heartbeat(3, newest.digest, now_ms()), "unknown"),
        ([], Heartbeat(3, newest.digest, now_ms()), "not signed"),
        ([key(0)], Heartbeat(3, "ab" * 32, now_ms()), "fork"),
        ([key(0)], Heartbeat(3, newest.digest, now_ms() + 2 * HOUR_MS), "clocks"),
    ):
        store.put(HEARTBEAT_KEY, [replace(beat, signatures=sign(beat.signed(), signers)).encode()])
        refused(store, trust, match)


# --- keys that are stolen, lost, or old ------------------------------------------------------------------------------


def test_a_thief_holds_one_of_two_keys() -> None:
    store, two = MemoryStore(), pinned(0, 1, threshold=2)
    model = publish(store, 2, keys=(0, 1), trust=two)
    consumer, held = follower(store, two)
    assert consumer.load(held).version == 2
    thief = copy_of(store)
    publish(thief, 1, model=dict(model), keys=(0,), trust=pinned(0))
    refused(thief, two, "needs 2 signatures")
    with pytest.raises(UntrustedError, match="needs 2 signatures"):
        publish(store, 1, model=model, keys=(1,), trust=two)
    assert list(store.list(manifest_key(3))) == []


def test_a_revoked_key_goes_on_publishing(tmp_path: Path) -> None:
    first = document()
    both = rotated(first, (0, 1))
    second = rotated(both, (1,))
    store = stored(MemoryStore(), first)
    model = publish(store, 2, trust=first)
    consumer, held = follower(store, first, memory=tmp_path / "seen.json")
    consumer.load(held)
    stored(store, both, second)
    publish(store, 1, model=dict(model), keys=(0,), trust=pinned(0))  # by the thief, after it was revoked
    with pytest.raises(UntrustedError, match="revoked"):
        consumer.poll()
    assert consumer.version == 2
    refused(store, first, "revoked", memory=tmp_path / "seen.json")
    with pytest.raises(UntrustedError, match="adopt="):
        publish(store, 1, model=model, keys=(1,), trust=first)


def test_a_store_withholds_the_revocation_of_a_key(tmp_path: Path) -> None:
    first = document()
    store = stored(MemoryStore(), first)
    publish(store, 2, trust=first)
    second = rotated(first, (0, 1))
    stored(store, second)
    consumer, model = follower(store, first, memory=tmp_path / "seen.json")
    consumer.load(model)
    store.delete(trust_key(2))
    refused(store, first, "rollback of the keys", memory=tmp_path / "seen.json")


def test_an_old_publisher_wakes_up(store: MemoryStore) -> None:
    """It signs with a key that ended; its versions are refused, and those from before are reached by links."""
    now = now_ms()
    trust = document((0, 1), expires_ms=None)
    ended = replace(trust, keys={**trust.keys, public(0)[0].id: public(0, expires_ms=now - 1)[0]}, signatures=())
    ended = replace(ended, signatures=sign(ended.signed(), [key(4)]))
    refused(store, ended, r"expired: .* \(ended at ")
    model = publish(store, 2, keys=(1,), trust=ended, adopt=manifest_of(store, 3).digest)
    consumer, held = follower(store, ended)
    assert consumer.load(held).version == 5
    assert same(held, model)
    with pytest.raises(UntrustedError, match="expired"):
        publish(store, 1, keys=(0,), trust=ended)


def test_a_trust_document_is_replaced_by_somebody_elses(tmp_path: Path) -> None:
    first = document()
    store = stored(MemoryStore(), first)
    publish(store, 1, trust=first)
    theirs = document((1,), (3,))
    forged = replace(theirs, version=2, signatures=())
    forged = replace(forged, signatures=sign(forged.signed(), [key(3)]))
    store.put(trust_key(2), [forged.encode()])
    refused(store, first, "root keys of the one before")
    store.put(trust_key(2), [replace(first, signatures=first.signatures).encode()])
    refused(store, first, "is that of version 1")


def test_the_owner_of_the_keys_has_gone() -> None:
    trust = document(expires_ms=None)
    ended = replace(trust, expires_ms=now_ms() - 1, signatures=())
    ended = replace(ended, signatures=sign(ended.signed(), [key(4)]))
    store = MemoryStore()
    publish(store, 1, trust=trust)
    refused(store, ended, "ended at")


def test_a_thief_holds_one_of_two_root_keys() -> None:
    first = document((0,), (3, 4), root_threshold=2)
    with pytest.raises(MisuseError, match="needs 2 signatures"):
        next_document(first, root=public(4), publisher=public(1), signers=[key(4)])
    store = stored(MemoryStore(), first)
    publish(store, 1, trust=first)
    forged = replace(document((1,), (4,)), version=2, signatures=())
    store.put(trust_key(2), [replace(forged, signatures=sign(forged.signed(), [key(4)])).encode()])
    refused(store, first, "needs 2 signatures by root keys of the one before")


# --- somebody who reads the store ------------------------------------------------------------------------------------


def test_a_reader_of_the_store_wants_the_weights() -> None:
    inner = MemoryStore()
    sealed = EncryptedStore(inner, [bytes(range(32))])
    secret = torch.frombuffer(bytearray(b"the weights are secret! " * 32), dtype=torch.float32).clone()
    model = publish(sealed, 2, model={"w": secret})
    raw = b"".join(inner.get(info.key, size_max=info.size) for info in inner.list(""))
    assert b"weights are secret" not in raw
    assert b"thinwire.manifest" not in raw
    consumer, held = follower(sealed, pinned())
    held = {"w": torch.zeros_like(model["w"])}
    assert consumer.load(held).version == 2
    assert same(held, model)


def test_a_sealed_object_is_swapped_or_cut_off() -> None:
    inner = MemoryStore()
    sealed = EncryptedStore(inner, [bytes(range(32))])
    publish(sealed, 3)
    deltas = [manifest_of(sealed, v).deltas[0].object for v in (2, 3)]  # type: ignore[arg-type]
    other = inner.get(deltas[0].key, size_max=1 << 20)
    for data in (other, inner.get(deltas[1].key, size_max=1 << 20)[:-16], b""):
        inner.put(deltas[1].key, [data])
        with pytest.raises(DamagedObjectError):
            sealed.get(deltas[1].key, size_max=1 << 20)
        consumer, model = follower(sealed, pinned())
        with pytest.raises(NoPathError):
            consumer.load(model)


# --- mistakes of our own ---------------------------------------------------------------------------------------------


def test_a_memory_that_is_damaged_is_not_taken_for_a_newcomers(store: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    consumer, model = follower(store, pinned(), memory=path)
    consumer.load(model)
    assert Memory.open(path).version == 3
    for text in ("{}", "", path.read_text()[:-3], path.read_text().replace("3", "x")):
        path.write_text(text)
        with pytest.raises(Exception, match="is damaged"):
            follower(store, pinned(), memory=path)


def test_a_signing_publisher_does_not_build_on_what_others_wrote() -> None:
    store = MemoryStore()
    model = publish(store, 2, keys=())
    with pytest.raises(UntrustedError, match="adopt="):
        publish(store, 1, model=model)
    with pytest.raises(UntrustedError, match="adopt="):
        publish(store, 1, model=model, adopt="ab" * 32)
    publish(store, 2, model=model, adopt=manifest_of(store, 2).digest)
    consumer, held = follower(store, pinned())
    assert consumer.load(held).version == 4  # what came before is proved by links
    assert same(held, model)
    late, held = follower(store, pinned())
    assert late.load(held, version=1).version == 1


def test_a_publisher_with_a_threshold_it_cannot_meet_says_so_before_it_uploads() -> None:
    store = MemoryStore()
    with pytest.raises(UntrustedError, match="what this publisher makes"):
        publish(store, 1, keys=(0,), trust=pinned(0, 1, threshold=2))
    assert list(store.list("")) == []
    with pytest.raises(MisuseError, match="a heartbeat needs a key"):
        Publisher(store).heartbeat()
    with pytest.raises(MisuseError, match="max_age_s"):
        Trust(document(), max_age_s=0)

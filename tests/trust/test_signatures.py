"""The laws of signatures, thresholds and trust documents."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chain.test_chain import chain
from tests.trust.scenes import (
    KEYS,
    document,
    follower,
    key,
    manifest_of,
    pinned,
    public,
    publish,
    rotated,
    same,
    stored,
)
from thinwire.chain.authority import Authority
from thinwire.chain.trusted import TrustedChain
from thinwire.crypto import SigningKey, verified
from thinwire.errors import ConflictError, MalformedError, MisuseError, RefuseError, UntrustedError
from thinwire.stores.memory import MemoryStore
from thinwire.sync.trust import Memory, first_document, next_document, publish_document, read_trust, signers_of
from thinwire.testing.faults import Fault, FaultyStore
from thinwire.wire import canonical
from thinwire.wire.manifest import Manifest, manifest_key
from thinwire.wire.signing import key_id, message, parse_public, parse_signatures, public_text, sign
from thinwire.wire.trust import Heartbeat, PublicKey, TrustDocument, trust_key, trust_version_of_key


def signed(manifest: Manifest, *keys: int) -> Manifest:
    return replace(manifest, signatures=sign(manifest.signed(), [KEYS[n] for n in keys]))


def accepted(data: bytes, version: int, *keys: int, threshold: int = 1) -> bool:
    authority = Authority(TrustDocument.of_keys([KEYS[n].public for n in keys], threshold))
    try:
        TrustedChain(authority=authority).accept_newest(data, version=version)
    except RefuseError:
        return False
    return True


MANIFEST = signed(chain(3)[3], 0).encode()


@settings(max_examples=150)
@given(at=st.integers(0, len(MANIFEST) - 1), flip=st.integers(1, 255))
def test_any_byte_that_was_changed_anywhere_in_a_signed_manifest_is_refused(at: int, flip: int) -> None:
    assert accepted(MANIFEST, 3, 0)
    changed = bytearray(MANIFEST)
    changed[at] ^= flip
    assert not accepted(bytes(changed), 3, 0)


def test_every_single_bit_of_the_signature_counts() -> None:
    start = MANIFEST.index(b'"sig":"') + 7
    for at in range(start, start + 128):
        changed = bytearray(MANIFEST)
        changed[at] = ord("0") if changed[at] != ord("0") else ord("1")
        assert not accepted(bytes(changed), 3, 0)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_a_signature_over_other_bytes_is_refused(data: bytes, other: bytes) -> None:
    made = key(0).sign(data)
    assert verified(key(0).public, made, data)
    assert verified(key(0).public, made, other) == (data == other)
    assert not verified(key(1).public, made, data)


@given(
    trusted=st.sets(st.integers(0, 4), min_size=1),
    signing=st.sets(st.integers(0, 4)),
    data=st.data(),
)
def test_enough_keys_and_no_fewer(trusted: set[int], signing: set[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, len(trusted)))
    manifest = signed(chain(1)[1], *signing)
    assert accepted(manifest.encode(), 1, *trusted, threshold=threshold) == (len(trusted & signing) >= threshold)


def test_one_key_that_signs_twice_counts_once() -> None:
    manifest = signed(chain(1)[1], 0)
    twice = replace(manifest, signatures=manifest.signatures * 2)
    assert not accepted(twice.encode(), 1, 0, 1, threshold=2)
    assert not accepted(twice.encode(), 1, 0)
    with pytest.raises(MisuseError, match="given twice"):
        sign(manifest.signed(), [key(0), key(0)])


def test_a_wrong_signature_of_a_known_key_is_refused_even_beside_enough_good_ones() -> None:
    good, bad = signed(chain(1)[1], 0), signed(chain(2)[2], 1)
    both = replace(good, signatures=(*good.signatures, *bad.signatures))
    assert accepted(both.encode(), 1, 0)  # key 1 is unknown: it counts for nothing
    assert not accepted(both.encode(), 1, 0, 1)


def test_what_was_signed_as_one_thing_does_not_pass_for_another() -> None:
    value = chain(1)[1].signed()
    for name in ("thinwire.skip.v1", "thinwire.trust.v1", "thinwire.heartbeat.v1"):
        assert message({**value, "format": name}) != message(value)
    assert not message(value).startswith(b"{")


@pytest.mark.parametrize(
    "values",
    [[1], [{}], [{"keyid": "00" * 32}], [{"keyid": "0" * 63, "sig": "00" * 64}], [{"keyid": "00" * 32, "sig": 5}],
     [{"keyid": "AA" * 32, "sig": "00" * 64}], [{"keyid": "00" * 32, "sig": "00" * 65}],
     [{"keyid": "00" * 32, "sig": "00" * 64, "more": 1}], [{"keyid": f"{n:064x}", "sig": "00" * 64} for n in range(65)],
     [{"keyid": "００" * 32, "sig": "00" * 64}]],
)  # fmt: skip
def test_malformed_signatures_are_refused(values: list[object]) -> None:
    with pytest.raises(MalformedError):
        parse_signatures(values)
    manifest = replace(chain(1)[1], signatures=tuple(values))
    assert not accepted(manifest.encode(), 1, 0)
    assert TrustedChain().accept(manifest.encode(), version=1) == manifest  # nobody who pins no keys is disturbed


def test_the_test_vector_of_rfc_8032() -> None:
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    made = bytes.fromhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b"
    )
    assert verified(public, made, b"")
    assert not verified(public, made, b"x")


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_written_and_read(tmp_path: Path) -> None:
    made, path = SigningKey.generate(), tmp_path / "key"
    path.write_bytes(made.pem())
    path.chmod(0o640)
    with pytest.raises(MisuseError, match="chmod 600"):
        SigningKey.load(path)
    path.chmod(0o600)
    assert SigningKey.load(path).public == made.public
    assert signers_of([path, key(0)])[1] is key(0)
    assert parse_public(public_text(made.public)) == made.public
    assert "PRIVATE" not in repr(made)
    path.write_bytes(b"not a key")
    with pytest.raises(MisuseError, match="PEM"):
        SigningKey.load(path)
    with pytest.raises(MisuseError, match="cannot read"):
        SigningKey.load(tmp_path / "none")
    for text in ("", made.pem().decode(), "thinwire-ed25519 00", "thinwire-ed25519 " + "G" * 64):
        with pytest.raises(MisuseError, match="not a public key"):
            parse_public(text)
    assert key_id(made.public) == PublicKey(made.public).id


def test_a_key_of_another_kind_is_refused() -> None:
    pem = (
        b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VuBCIEIHBw8zL6iZ8d0bqHBqUWUF3pPTzTR8XTVbgyOAsBqnxR\n"
        b"-----END PRIVATE KEY-----\n"
    )  # X25519
    with pytest.raises(MisuseError, match="not an Ed25519"):
        SigningKey.from_pem(pem)


def test_pins_are_read_from_files(tmp_path: Path) -> None:
    for n in range(2):
        (tmp_path / f"{n}.pub").write_text(public_text(key(n).public))
    trust = read_trust([tmp_path / "0.pub", tmp_path / "1.pub"], max_age_s=5)
    assert (len(trust.document.keys), trust.document.version, trust.max_age_s) == (2, 0, 5)
    (tmp_path / "trust.json").write_bytes(document().encode() + b"\n")
    assert read_trust(tmp_path / "trust.json").document == document()
    (tmp_path / "bad.json").write_bytes(replace(document(), signatures=()).encode())
    with pytest.raises(UntrustedError, match="not signed"):
        read_trust(tmp_path / "bad.json")
    with pytest.raises(MisuseError, match="not a public key"):
        read_trust([tmp_path / "trust.json", tmp_path / "0.pub"])
    with pytest.raises(MisuseError, match="cannot read"):
        read_trust(tmp_path / "none")
    with pytest.raises(MisuseError, match="as many keys"):
        TrustDocument.of_keys([key(0).public, key(0).public], 2)


# --- trust documents -------------------------------------------------------------------------------------------------


def sealed(value: dict[str, object]) -> bytes:
    import hashlib

    return canonical.dump(
        {"digest": hashlib.sha256(canonical.dump(value)).hexdigest(), "signatures": [], "signed": value}
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], 0), (["version"], "1"), (["format"], "thinwire.trust.v2"), (["keys"], {}), (["keys"], []),
        (["keys", "*", "public"], "00"), (["keys", "*", "type"], "rsa"), (["keys", "*", "expires_ms"], -1),
        (["keys", "*", "public"], "00" * 32), (["keys", "*", "more"], 1), (["roles"], []), (["roles"], {}),
        (["roles", "root"], ...), (["roles", "publisher", "threshold"], 2), (["roles", "publisher", "threshold"], 0),
        (["roles", "publisher", "keys"], []), (["roles", "publisher", "keys"], ["00" * 32]),
        (["roles", "publisher", "keys"], [[]]), (["roles", "publisher", "more"], 1), (["chain"], ""), (["chain"], 3),
        (["expires_ms"], "never"), (["expires_ms"], True), (["expires_ms"], 1 << 60),
    ],
)  # fmt: skip
def test_a_trust_document_with_a_wrong_field_is_refused(path: list[str], value: object) -> None:
    whole = json.loads(document().encode())["signed"]
    assert TrustDocument.parse(sealed(whole)).version == 1
    at = whole
    for name in path[:-1]:
        at = at[next(iter(at)) if name == "*" else name]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    with pytest.raises(RefuseError):
        TrustDocument.parse(sealed(whole))


@given(st.binary(max_size=200))
def test_noise_is_neither_document_nor_heartbeat(data: bytes) -> None:
    for parse in (TrustDocument.parse, Heartbeat.parse):
        with pytest.raises(RefuseError):
            parse(data)


def test_fields_of_later_releases_are_kept() -> None:
    whole = json.loads(document().encode())["signed"]
    data = sealed({**whole, "novelty": [1]})
    assert TrustDocument.parse(data).encode() == data
    beat = Heartbeat(1, "ab" * 32, 5, {"novelty": None})
    assert Heartbeat.parse(beat.encode()) == beat
    assert trust_version_of_key(trust_key(7)) == 7
    assert trust_version_of_key("trust/7.json") is None


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sets(st.integers(0, 3), min_size=1), st.sets(st.integers(3, 4), min_size=1)), max_size=5))
def test_who_pinned_any_version_walks_to_the_last(steps: list[tuple[set[int], set[int]]]) -> None:
    documents = [document()]
    for publisher, root in steps:
        documents.append(rotated(documents[-1], sorted(publisher), root=sorted(root)))
    for start in range(len(documents)):
        authority = Authority(documents[start])
        for one in documents[start + 1 :]:
            authority.advance(one.encode())
        assert authority.document == documents[-1]
        for one in documents[: len(documents) - 1]:
            with pytest.raises(UntrustedError):
                authority.advance(one.encode())


def test_documents_are_made_with_enough_keys_or_not_at_all() -> None:
    with pytest.raises(MisuseError, match="private keys of enough root keys"):
        first_document(root=public(4), publisher=public(0), signers=[key(0)])
    with pytest.raises(MisuseError, match="as many keys"):
        first_document(root=public(4), publisher=public(0), signers=[key(4)], threshold=2)
    with pytest.raises(MisuseError, match="different ends"):
        first_document(root=public(4), publisher=public(4, expires_ms=1), signers=[key(4)])
    with pytest.raises(MisuseError, match="at least one"):
        first_document(root=public(4), publisher=[], signers=[key(4)])
    for alone in (3, 4):  # old and new root keys must both sign
        with pytest.raises(MisuseError, match="old and new"):
            next_document(document(), root=public(3), publisher=public(0), signers=[key(alone)])


def test_a_trust_document_is_created_once_and_only_behind_the_one_before() -> None:
    first, store = document(), MemoryStore()
    second, other = rotated(first, (1,)), rotated(first, (2,))
    with pytest.raises(MisuseError, match="does not follow"):
        publish_document(store, second)
    stored(store, first, second)
    publish_document(store, second)  # again, after a lost reply
    with pytest.raises(ConflictError, match="make version 3"):
        publish_document(store, other)
    with pytest.raises(MisuseError, match="does not follow"):
        publish_document(store, rotated(rotated(second, (0,)), (1,)))


# --- following through a rotation ------------------------------------------------------------------------------------


def rotate_in(store: MemoryStore, held: TrustDocument) -> TrustDocument:
    both = rotated(held, (0, 1))
    stored(store, both)
    return both


def test_a_follower_walks_through_a_rotation_and_a_newcomer_reads_the_old_versions_by_links(tmp_path: Path) -> None:
    first, store = document(), MemoryStore()
    stored(store, first)
    model = publish(store, 4, trust=first)
    follow, held = follower(store, first, memory=tmp_path / "a")
    follow.load(held)
    both = rotate_in(store, first)
    publish(store, 1, model=model, keys=(1,), trust=first)
    stored(store, rotated(both, (1,)))
    publish(store, 2, model=model, keys=(1,), trust=first)
    assert follow.poll().apply(held).version == 7  # type: ignore[union-attr]
    assert same(held, model)
    memory = Memory.open(tmp_path / "a")
    assert (memory.version, memory.trust) == (7, 3)
    seen = FaultyStore(store, [])
    newcomer, fresh = follower(seen, first)
    assert newcomer.load(fresh).version == 7  # its anchor is version 1, signed by the revoked key
    assert same(fresh, model)
    old, fresh = follower(store, first)
    assert old.load(fresh, version=2).version == 2


def test_history_that_is_not_linked_is_refused_whoever_signed_it(tmp_path: Path) -> None:
    first, store = document(), MemoryStore()
    stored(store, first)
    model = publish(store, 3, trust=first)
    both = rotate_in(store, first)
    publish(store, 1, model=model, keys=(1,), trust=first)
    stored(store, rotated(both, (1,)))
    forged = signed(replace(manifest_of(store, 2), step=5), 0)  # by the thief of the revoked key
    store.put(manifest_key(2), [forged.encode()])
    consumer, held = follower(store, first)
    with pytest.raises(UntrustedError, match=r"built on manifest|fork"):
        consumer.load(held, version=2)


def test_one_mangled_reply_about_trust_is_asked_for_again(tmp_path: Path) -> None:
    first, store = document(), MemoryStore()
    stored(store, first)
    publish(store, 1, trust=first)
    rotate_in(store, first)
    faulty = FaultyStore(
        store, [Fault("get", 1, "flip", key=trust_key(2)), Fault("get", 1, "short", key=manifest_key(1))]
    )
    consumer, held = follower(faulty, first)
    assert consumer.load(held).version == 1


def test_following_costs_one_request_a_version_more() -> None:
    store = MemoryStore()
    model = publish(store, 1, trust=stored_first(store))
    seen = FaultyStore(store, [])
    consumer, held = follower(seen, document())
    consumer.load(held)
    begun = len(seen.log)
    assert consumer.poll() is None
    assert len(seen.log) == begun + 1  # as without keys
    publish(store, 1, model=model, trust=document())
    assert consumer.poll() is not None
    asked = [operation.key for operation in seen.log[begun + 1 :]]
    assert asked.count(trust_key(2)) <= 2
    assert "heartbeat.json" not in asked


def stored_first(store: MemoryStore) -> TrustDocument:
    stored(store, document())
    return document()


def test_without_trust_memory_alone_refuses_a_rollback(tmp_path: Path) -> None:
    store = MemoryStore()
    publish(store, 2, keys=())
    consumer, held = follower(store, None, memory=tmp_path / "seen")
    consumer.load(held)
    assert stat.S_ISREG((tmp_path / "seen").stat().st_mode)
    store.delete(manifest_key(2))
    again, held = follower(store, None, memory=tmp_path / "seen")
    with pytest.raises(UntrustedError, match="rollback"):
        again.load(held, timeout_s=0)


def test_a_signed_chain_reads_without_pins_and_signing_is_reproducible() -> None:
    store = MemoryStore()
    model = publish(store, 2)
    consumer, held = follower(store, None)
    assert consumer.load(held).version == 2
    assert same(held, model)
    manifest = manifest_of(store, 2)
    assert signed(manifest, 0) == manifest
    assert pinned(0).document.version == 0

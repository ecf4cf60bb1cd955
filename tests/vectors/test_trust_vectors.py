"""Signed files and sealed objects as they were written: read by the library, and by the specification alone."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.vectors.make_trust import KEY, OBJECTS, files, key_of
from thinwire.crypto import verified
from thinwire.stores.encrypted import CHUNK_BYTES, EncryptedStore
from thinwire.stores.memory import MemoryStore
from thinwire.wire.manifest import Manifest
from thinwire.wire.signing import message, parse_signatures
from thinwire.wire.skip import Skip
from thinwire.wire.trust import Heartbeat, TrustDocument

VECTORS = json.loads((Path(__file__).parent / "trust-v1.json").read_text())
READERS = {"manifest": Manifest.parse, "skip": Skip.parse, "trust": TrustDocument.parse, "heartbeat": Heartbeat.parse}


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize("name", sorted(READERS))
def test_the_library_writes_and_reads_the_same_bytes(name: str) -> None:
    data = VECTORS["signed"][name].encode()
    assert files()[name] == data  # Ed25519 gives the same signature every time
    found = READERS[name](data)
    signatures = parse_signatures(found.signatures)
    assert len(signatures) == 2
    publics = [bytes.fromhex(text) for text in VECTORS["public"].values()]
    assert all(any(verified(p, s.sig, message(found.signed())) for p in publics) for s in signatures)


@pytest.mark.parametrize("name", sorted(READERS))
def test_the_specification_alone_verifies_them(name: str) -> None:
    text = VECTORS["signed"][name]
    envelope = json.loads(text)
    assert canonical(envelope) == text.encode()
    signed = envelope["signed"]
    covered = b"thinwire signature v1\n" + signed["format"].encode() + b"\n" + canonical(signed)
    publics = {
        hashlib.sha256(b"thinwire key v1\ned25519\n" + bytes.fromhex(p)).hexdigest(): bytes.fromhex(p)
        for p in VECTORS["public"].values()
    }
    for signature in envelope["signatures"]:
        key = Ed25519PublicKey.from_public_bytes(publics[signature["keyid"]])
        key.verify(bytes.fromhex(signature["sig"]), covered)
        with pytest.raises(InvalidSignature):
            key.verify(bytes.fromhex(signature["sig"]), covered + b" ")


def test_keys_are_those_of_their_seeds() -> None:
    assert {str(seed): key_of(seed).public.hex() for seed in (1, 2)} == VECTORS["public"]


@pytest.mark.parametrize("key", sorted(VECTORS["sealed"]))
def test_the_library_opens_what_was_sealed(key: str) -> None:
    inner = MemoryStore()
    inner.put(key, [bytes.fromhex(VECTORS["sealed"][key])])
    assert EncryptedStore(inner, [KEY]).get(key, size_max=1000) == OBJECTS[key]


def plainly(data: bytes, key: str) -> bytes:
    """The plaintext, by the specification alone."""
    header, body, opened = data[:64], data[64:], b""
    assert header[:16] == b"thinwire-sealed1"
    assert header[16:24] == hashlib.sha256(b"thinwire object key v1\n" + KEY).digest()[:8]
    assert header[24:32] == bytes(8)
    cipher = AESGCM(hmac.new(KEY, b"thinwire object v1\n" + header[32:], hashlib.sha256).digest())
    chunks = [body[at : at + CHUNK_BYTES + 16] for at in range(0, len(body), CHUNK_BYTES + 16)]
    for number, chunk in enumerate(chunks):
        nonce = number.to_bytes(11, "big") + bytes([number + 1 == len(chunks)])
        opened += cipher.decrypt(nonce, chunk, header + key.encode())
    return opened


@pytest.mark.parametrize("key", sorted(VECTORS["sealed"]))
def test_the_specification_alone_opens_them(key: str) -> None:
    assert plainly(bytes.fromhex(VECTORS["sealed"][key]), key) == OBJECTS[key]


def test_an_object_of_several_chunks_opens_by_the_specification() -> None:
    inner = MemoryStore()
    EncryptedStore(inner, [KEY]).put("objects/c", [OBJECTS["objects/c"]])
    assert plainly(inner.get("objects/c", size_max=1 << 22), "objects/c") == OBJECTS["objects/c"]

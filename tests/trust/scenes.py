"""Small signed chains, and the people who tamper with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from thinwire import Consumer, Publisher
from thinwire.crypto import SigningKey
from thinwire.stores.memory import MemoryStore
from thinwire.sync.trust import Trust, first_document, next_document, publish_document
from thinwire.wire.manifest import Manifest, Parent, manifest_key
from thinwire.wire.signing import sign
from thinwire.wire.trust import PublicKey, TrustDocument

__all__ = [
    "KEYS", "Model", "copy_of", "document", "follower", "forge", "key", "manifest_of", "pinned", "public", "publish",
    "rotated", "same", "truncated",
]  # fmt: skip

Model = dict[str, torch.Tensor]
KEYS = [SigningKey.generate() for _ in range(5)]


def key(n: int) -> SigningKey:
    return KEYS[n]


def public(*numbers: int, expires_ms: int | None = None) -> list[PublicKey]:
    return [PublicKey(KEYS[n].public, expires_ms) for n in numbers]


def document(
    publisher: Sequence[int] = (0,), root: Sequence[int] = (4,), *, expires_ms: int | None = None, **how: Any
) -> TrustDocument:
    """Version 1 of a trust document: key 4 is root and key 0 publishes."""
    return first_document(
        root=public(*root), publisher=public(*publisher, expires_ms=expires_ms),
        signers=[KEYS[n] for n in root], **how,
    )  # fmt: skip


def rotated(held: TrustDocument, publisher: Sequence[int], *, root: Sequence[int] = (4,), **how: Any) -> TrustDocument:
    """The next version, signed by old root keys and new ones."""
    old = [n for n in range(5) if KEYS[n].public in {held.keys[k].public for k in held.role("root").keys}]
    signers = [KEYS[n] for n in sorted({*old, *root})]
    return next_document(held, root=public(*root), publisher=public(*publisher), signers=signers, **how)


def pinned(*numbers: int, threshold: int = 1, **how: Any) -> Trust:
    """Trust in bare keys."""
    return Trust(TrustDocument.of_keys([KEYS[n].public for n in numbers or (0,)], threshold), **how)


def publish(store: Any, count: int, *, model: Model | None = None, keys: Sequence[int] = (0,), **how: Any) -> Model:
    """``count`` further versions, signed."""
    model = {"w": torch.arange(64, dtype=torch.float32)} if model is None else model
    signers = [KEYS[n] for n in keys]
    with Publisher(store, threads=1, retry_s=0, key=signers or None, **{"anchor_ratio": 100.0, **how}) as publisher:
        for _ in range(count):
            model["w"][:3] += 1
            publisher.publish(model)
    return model


def follower(store: Any, trust: Any, **how: Any) -> tuple[Consumer, Model]:
    return Consumer(store, retry_s=0, threads=1, trust=trust, **how), {"w": torch.zeros(64)}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def copy_of(store: MemoryStore) -> MemoryStore:
    copied = MemoryStore()
    for info in store.list(""):
        copied.put(info.key, [store.get(info.key, size_max=info.size)])
    return copied


def truncated(store: MemoryStore, newest: int) -> MemoryStore:
    """The store as it was at version ``newest``, as far as its manifests tell."""
    copied = copy_of(store)
    for info in list(copied.list("manifests/", start_after=manifest_key(newest))):
        copied.delete(info.key)
    copied.delete("latest.json")
    return copied


def manifest_of(store: MemoryStore, version: int) -> Manifest:
    return Manifest.parse(store.get(manifest_key(version), size_max=1 << 20))


def forge(store: MemoryStore, version: int, keys: Sequence[int] = (), **changes: Any) -> None:
    """Replace fields of a manifest and make all later ones fit, signed by ``keys``."""
    before = None
    newest = max(int(info.key[10:20]) for info in store.list("manifests/"))
    for v in range(version, newest + 1):
        manifest = manifest_of(store, v)
        if v == version:
            manifest = replace(manifest, **changes)
        if before is not None:
            manifest = replace(manifest, parent=Parent(v - 1, before))
        manifest = replace(manifest, signatures=sign(manifest.signed(), [KEYS[n] for n in keys]))
        before = manifest.digest
        store.put(manifest_key(v), [manifest.encode()])


def stored(store: MemoryStore, *documents: TrustDocument) -> MemoryStore:
    for one in documents:
        publish_document(store, one, retry_s=0)
    return store

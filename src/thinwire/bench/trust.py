"""What keys cost: signing and verifying a version, beside a publish; encrypting objects, beside leaving them plain."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from thinwire.bench.measure import GIB, load, machine, seconds, versions
from thinwire.chain.authority import Authority
from thinwire.chain.trusted import TrustedChain
from thinwire.crypto import SigningKey
from thinwire.stores.encrypted import EncryptedStore
from thinwire.stores.memory import MemoryStore
from thinwire.sync.publisher import Publisher
from thinwire.sync.remote import Remote
from thinwire.wire.signing import sign
from thinwire.wire.trust import TrustDocument

__all__ = ["trust_rows"]


def _each(run: Callable[[], object], rounds: int) -> float:
    """Seconds of one call, the median over rounds."""
    return median(seconds(run) for _ in range(rounds))


def _processor(run: Callable[[], object], rounds: int) -> float:
    """Seconds of processor time of one call, the least of rounds: what it takes, whoever else is at work."""
    took = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        took.append(time.process_time() - began)
    return max(min(took), 1e-9)


def _publish_s(elements: int, repeats: int) -> tuple[float, Any]:
    """Seconds of a publish of a patch (1 % of bf16 cells change), signed; and its manifest."""
    generator = torch.Generator().manual_seed(0)
    model = {"w": torch.randn(elements, generator=generator).bfloat16()}
    store, key = MemoryStore(), SigningKey.generate()
    took = []
    with Publisher(store, anchor_ratio=1e9, key=key) as publisher:
        for _ in range(repeats + 1):
            where = torch.randint(0, elements, (elements // 100,), generator=generator)
            model["w"][where] *= 1.01
            took.append(publisher.publish(model).seconds["total"])
        newest = Remote(store, retry_s=0).newest()
    return median(took[1:]), newest


def trust_rows(elements: int = 25_000_000, *, object_bytes: int = 64 << 20, repeats: int = 5) -> list[dict[str, Any]]:
    """Two rows: ``sign`` (seconds for one manifest, and of a whole publish) and ``encrypt`` (GiB a
    second of processor time, memory to memory).

    What is read back is compared before anything is noted.
    """
    publish_s, manifest = _publish_s(elements, repeats)
    key = SigningKey.generate()
    signed = manifest.signed()
    document = TrustDocument.of_keys([key.public])
    signatures = sign(signed, [key])
    authority = Authority(document)

    def check() -> None:
        authority.check(signed, signatures, role="publisher", now_ms=0, what="it")

    data = manifest.encode()
    about = {"load": load(), "machine": machine(), "versions": versions()}
    rows: list[dict[str, Any]] = [
        {
            "bench": "trust", "what": "sign", "elements": elements, "manifest_bytes": len(data),
            "sign_s": _each(lambda: sign(signed, [key]), 300), "verify_s": _each(check, 300),
            "parse_s": _each(lambda: TrustedChain().accept(data, version=manifest.version), 300),
            "publish_s": publish_s, **about,
        }
    ]  # fmt: skip
    body = os.urandom(object_bytes)
    row: dict[str, Any] = {"bench": "trust", "what": "encrypt", "object_bytes": object_bytes}
    for name, store in (("plain", MemoryStore()), ("sealed", EncryptedStore(MemoryStore(), [os.urandom(32)]))):
        row[f"{name}_put_gib_s"] = object_bytes / GIB / _processor(lambda s=store: s.put("a", [body]), repeats)  # type: ignore[misc]
        assert store.get("a", size_max=object_bytes) == body
        row[f"{name}_get_gib_s"] = (
            object_bytes / GIB / _processor(lambda s=store: s.get("a", size_max=object_bytes), repeats)  # type: ignore[misc]
        )
    rows.append({**row, **about})
    return rows

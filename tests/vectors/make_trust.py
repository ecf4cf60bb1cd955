"""Write the test vectors of signed files and sealed objects. A file that is there is never rewritten.

python -m tests.vectors.make_trust FILE
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.crypto import SigningKey
from thinwire.stores.encrypted import CHUNK_BYTES, EncryptedStore
from thinwire.stores.memory import MemoryStore
from thinwire.wire.manifest import Manifest, ObjectRef
from thinwire.wire.signing import sign
from thinwire.wire.skip import Skip, skip_key
from thinwire.wire.trust import Heartbeat, TrustDocument

OBJECTS = {"objects/a": b"", "objects/b": b"weights", "objects/c": bytes(range(256)) * (CHUNK_BYTES // 256) + b"end"}
KEY = bytes(range(32))


def key_of(seed: int) -> SigningKey:
    """A private key that everybody knows."""
    return SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


def files() -> dict[str, bytes]:
    """A manifest, a skip delta's record, a trust document and a heartbeat, signed by the keys 1 and 2."""
    signers = [key_of(1), key_of(2)]
    ref = ObjectRef("objects/0000000001-00/tree.json", 5, "44" * 32)
    manifest = Manifest(
        version=1, state="11" * 32, hash="blake3", parent=None, tree=ref, deltas=(), anchor=(ref,), anchor_version=1,
        metadata={"réward": "½"}, extra={"chain": "run-7"},
    )  # fmt: skip
    patch = ObjectRef(skip_key(2, 10).removesuffix(".json") + "/x", 9, "55" * 32)
    skip = Skip(base=2, version=10, base_state="22" * 32, state="33" * 32, hash="sha256", object=patch, changed=77)
    trust = replace(TrustDocument.of_keys([s.public for s in signers]), version=1, chain="run-7")
    beat = Heartbeat(1, manifest.digest, 1_700_000_000_000)
    return {
        name: replace(file, signatures=sign(file.signed(), signers)).encode()
        for name, file in (("manifest", manifest), ("skip", skip), ("trust", trust), ("heartbeat", beat))
    }


def main(path: Path) -> None:
    store = MemoryStore()
    sealed = EncryptedStore(store, [KEY])
    for key, data in OBJECTS.items():
        sealed.put(key, [data])
    objects = {key: store.get(key, size_max=1 << 22) for key in OBJECTS}
    vectors = {
        "public": {str(seed): key_of(seed).public.hex() for seed in (1, 2)},
        "signed": {name: data.decode() for name, data in files().items()},
        "sealed": {key: data.hex() for key, data in objects.items() if len(data) < 1000},
    }
    with path.open("x") as file:
        json.dump(vectors, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Coverage-guided noise for every reader of outside bytes: `make fuzz`, or FUZZ_S=3600 make fuzz.

Each input is given to one reader, chosen by its first byte. A reader may raise ThinwireError and nothing else, and an
apply that raises must leave its base as it was.
"""

from __future__ import annotations

import sys

import atheris

# Numba cannot compile instrumented functions: the modules with kernels come first, as they are.
import thinwire.tensors.kernels
import thinwire.wire.context
import thinwire.wire.positions
import thinwire.wire.rans
import thinwire.wire.values  # noqa: F401

with atheris.instrument_imports(include=["thinwire.wire", "thinwire.sync"]):
    import numpy as np

    from thinwire.errors import ThinwireError
    from thinwire.stores.encrypted import EncryptedStore
    from thinwire.stores.memory import MemoryStore
    from thinwire.sync.anchor import read_shards
    from thinwire.sync.apply import apply_patch
    from thinwire.sync.encode import Options, make_patch, take_snapshot
    from thinwire.sync.layout import Layout, MemorySource
    from thinwire.wire import rans
    from thinwire.wire.chunks import Box, Chunk, ChunkedTensor, ChunkMap
    from thinwire.wire.digests import Tree
    from thinwire.wire.manifest import Manifest, ObjectRef
    from thinwire.wire.patch import Patch
    from thinwire.wire.segment import decode_segment
    from thinwire.wire.signing import parse_signatures
    from thinwire.wire.skip import Skip
    from thinwire.wire.spec import DTYPES
    from thinwire.wire.trust import Heartbeat, PublicKey, Role, TrustDocument

BF16 = DTYPES["BF16"]
BASE = (np.random.default_rng(0).standard_normal(600).astype(np.float32) * 0.02).view(np.uint32) >> 16
BASE = BASE.astype(np.uint16)
LAYOUTS = {"w": Layout(BF16, (600,))}


def _patch(data: bytes) -> None:
    cells = {"w": BASE.copy()}
    try:
        apply_patch(Patch.parse(data), dict(LAYOUTS), cells, threads=1)
    except ThinwireError:
        assert list(cells) == ["w"]
        assert (cells["w"] == BASE).all()
        raise


def _segment(data: bytes) -> None:
    for changed in (1, 30, 600):
        try:
            decode_segment(memoryview(data), BF16, cells=600, changed=changed, values="ulp", base=[BASE])
        except ThinwireError:
            pass


def _stream(data: bytes) -> None:
    for count, dtype in ((1, np.uint8), (700, np.uint16), (3000, np.uint32), (70000, np.uint64)):
        try:
            rans.decode(data, count, dtype)
        except ThinwireError:
            pass


def _trust(data: bytes) -> None:
    document = TrustDocument.parse(data)
    parse_signatures(document.signatures)
    assert TrustDocument.parse(document.encode()) == document


def _sealed(data: bytes) -> None:
    inner = MemoryStore()
    inner.put("a", [data])
    EncryptedStore(inner, [bytes(32)]).get("a", size_max=1 << 20)


READERS = [
    _patch, _segment, _stream, Manifest.parse, Tree.parse, lambda data: read_shards([data]),
    Skip.parse, _trust, Heartbeat.parse, _sealed, ChunkMap.parse,
]  # fmt: skip


def one_input(data: bytes) -> None:
    """Called by the fuzzer."""
    if not data:
        return
    try:
        READERS[data[0] % len(READERS)](data[1:])
    except ThinwireError:
        pass


def seeds() -> list[bytes]:
    """Valid inputs, so that the fuzzer begins behind the first checks."""
    new = BASE.copy()
    new[::9] += 1
    found = []
    for level in ("small", "smallest"):
        snapshot = take_snapshot(MemorySource(LAYOUTS, {"w": BASE.copy()}))
        patch = make_patch(snapshot, MemorySource(LAYOUTS, {"w": new}), Options(level, "ulp", 1))
        found += [b"\0" + b"".join(patch.encode()), b"\1" + bytes(patch.segments[0])]
    found += [b"\2" + rans.encode(new), b"\4" + snapshot.tree.encode()]
    key, reference = PublicKey(bytes(32)), ObjectRef("skips/0000000003-0000000001/x", 1, "ab" * 32)
    role = Role((key.id,))
    found.append(b"\6" + Skip(1, "ab" * 32, 3, "cd" * 32, "blake3", reference).encode())
    found.append(b"\7" + TrustDocument(1, {key.id: key}, {"root": role, "publisher": role}).encode())
    found.append(b"\10" + Heartbeat(1, "ab" * 32, 1).encode())
    chunks = tuple(Chunk("w", Box((300 * k,), (300,)), k, 0) for k in range(2))
    found.append(b"\12" + ChunkMap({"w": ChunkedTensor("BF16", (600,), chunks)}, {"head": "w"}, 2).encode())
    inner = MemoryStore()
    EncryptedStore(inner, [bytes(32)]).put("a", [b"weights"])
    found.append(b"\11" + inner.get("a", size_max=1 << 10))
    return found


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp(prefix="thinwire-fuzz-"))
    for k, seed in enumerate(seeds()):
        (folder / f"seed{k}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[1:], "-max_len=4096", str(folder)], one_input)
    atheris.Fuzz()

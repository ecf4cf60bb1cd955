"""What the tests of the cache share."""

from __future__ import annotations

from pathlib import Path

from thinwire.stores.memory import MemoryStore
from thinwire.testing.faults import FaultyStore

KEY = "objects/0000000001-abc/delta.safetensors"


def counted(**keys: bytes) -> tuple[MemoryStore, FaultyStore]:
    inner = MemoryStore()
    for key, data in keys.items():
        inner.put(key, [data])
    return inner, FaultyStore(inner)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "v1" / "entries").rglob("*") if path.is_file())

"""A chain with all its skip deltas, made once for a file of tests."""

from __future__ import annotations

import pytest

from tests.sync.skipping import State, publish
from thinwire.stores.memory import MemoryStore
from thinwire.sync.compactor import compact


@pytest.fixture(scope="module")
def chain() -> tuple[MemoryStore, list[State]]:
    store = MemoryStore()
    states = publish(store, 18)
    compact(store, threads=1)
    return store, states

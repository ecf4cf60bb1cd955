"""MemoryStore keeps the contract and shares its objects by name."""

from __future__ import annotations

import pickle

import pytest

from thinwire.errors import MisuseError, ObjectNotFoundError
from thinwire.stores import open_store
from thinwire.stores.memory import MemoryStore
from thinwire.testing.stores import StoreContract


class TestContract(StoreContract):
    race_rounds = 50

    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()


def test_stores_of_one_name_share_their_objects() -> None:
    open_store("memory://test-shared").put("a", [b"x"])
    assert MemoryStore("test-shared").get("a", size_max=1) == b"x"
    with pytest.raises(ObjectNotFoundError):
        MemoryStore("test-other").get("a", size_max=1)


def test_stores_without_a_name_share_nothing() -> None:
    open_store("memory://").put("a", [b"x"])
    assert list(open_store("memory://").list("")) == []


def test_a_memory_store_cannot_be_sent_to_another_process() -> None:
    with pytest.raises(MisuseError, match="LocalStore"):
        pickle.dumps(MemoryStore("test-shared"))

"""A store that gives copies is told of a bad one, and the next answer comes from the objects themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import thinwire
from thinwire.errors import NoPathError
from thinwire.stores import ObjectInfo
from thinwire.stores.memory import MemoryStore


class Copies:
    """Gives bad copies of all objects under ``prefix``, until it is told so of each."""

    def __init__(self, origin: MemoryStore, prefix: str) -> None:
        self.origin, self.prefix, self.told = origin, prefix, list[str]()

    def get(self, key: str, *, size_max: int) -> bytes:
        data = self.origin.get(key, size_max=size_max)
        if key.startswith(self.prefix) and key not in self.told:
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        return self.origin.list(prefix, start_after=start_after)


class Telling(Copies):
    def distrust(self, key: str) -> None:
        self.told.append(key)


def _published() -> tuple[MemoryStore, torch.nn.Module]:
    store, model = MemoryStore(), torch.nn.Linear(32, 32)
    publisher = thinwire.Publisher(store)
    publisher.publish(model)
    with torch.no_grad():
        model.weight[3].add_(1.0)
    publisher.publish(model)
    return store, model


@pytest.mark.parametrize("prefix", ["manifests/", "objects/", ""])
@pytest.mark.parametrize("watched", [False, True])
def test_bad_copies_are_distrusted_and_fetched_anew(prefix: str, watched: bool) -> None:
    store, model = _published()
    copies, served = Telling(store, prefix), torch.nn.Linear(32, 32)
    consumer = thinwire.Consumer(copies, retry_s=1.0, observer=print if watched else None)
    assert consumer.load(served).version == 2
    assert torch.equal(served.weight, model.weight)
    assert copies.told
    assert all(key.startswith(prefix) for key in copies.told)


def test_without_the_verb_a_bad_copy_is_asked_for_twice_and_refused() -> None:
    store, _ = _published()
    with pytest.raises(NoPathError):
        thinwire.Consumer(Copies(store, "objects/"), retry_s=1.0).load(torch.nn.Linear(32, 32))

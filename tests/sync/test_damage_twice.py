"""What was damaged on its way, as often as it was asked for, is asked for again at the next look."""

from __future__ import annotations

import pytest

import thinwire
from tests.sync.models import bits, nudge, small_model
from thinwire.errors import NoPathError
from thinwire.stores.memory import MemoryStore
from thinwire.testing.faults import Fault, FaultyStore


@pytest.mark.parametrize("kind", ["flip", "short", "missing"])
def test_the_only_patch_is_damaged_twice_and_whole_later(kind: str) -> None:
    inner, model = MemoryStore(), small_model()
    publisher = thinwire.Publisher(inner, anchor_ratio=100)
    publisher.publish(model)
    patch = Fault("get", 2, kind, times=4, key="objects/")  # type: ignore[arg-type]  # the first is the anchor
    store, served = FaultyStore(inner, [patch]), small_model(3)
    consumer = thinwire.Consumer(store, retry_s=1.0)
    consumer.load(served)
    nudge(model, seed=1)
    publisher.publish(model)
    version = consumer.poll()  # asks twice
    assert version is not None
    with pytest.raises(NoPathError):  # and twice
        version.apply(served)
    assert consumer.version == 1
    version = consumer.poll()
    assert version is not None
    version.apply(served)
    assert bits(served) == bits(model)

"""Publishers, consumers and a collector in any order, with crashes between: a state machine searched by Hypothesis.

The law: whatever a consumer holds is, bit for bit, the version that some publish reported under that number.
"""

from __future__ import annotations

import time

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import thinwire
from tests.sync.models import bits, nudge, small_model
from thinwire.errors import ConflictError, NoPathError
from thinwire.stores.memory import MemoryStore
from thinwire.sync.collector import collect
from thinwire.testing.faults import Fault, FaultyStore, SimulatedCrash

PUBLISHERS, CONSUMERS = 2, 3


class Chain(RuleBasedStateMachine):
    """Two trainers that may fight over the store, three workers."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.truth: dict[int, dict[str, bytes]] = {}
        self.publishers: list[thinwire.Publisher | None] = [None] * PUBLISHERS
        self.trained = [small_model(seed) for seed in range(PUBLISHERS)]
        self.consumers: list[thinwire.Consumer | None] = [None] * CONSUMERS
        self.served = [small_model(10 + k) for k in range(CONSUMERS)]
        self.step = 0

    def publisher(self, k: int) -> thinwire.Publisher:
        found = self.publishers[k]
        if found is None:
            found = thinwire.Publisher(self.store, anchor_every=4, level=["small", "smallest"][k])
            self.publishers[k] = found
        return found

    def move(self, k: int) -> torch.nn.Module:
        self.step += 1
        nudge(self.trained[k], self.step)
        return self.trained[k]

    @rule(k=st.integers(0, PUBLISHERS - 1), wait=st.booleans())
    def publish(self, k: int, wait: bool) -> None:
        model = self.move(k)
        try:
            publisher = self.publisher(k)
            report = publisher.publish(model) if wait else publisher.publish(model, wait=False).result(60)
        except ConflictError:
            self.publishers[k] = None
            return
        assert report.version == max(self.truth, default=0) + 1
        self.truth[report.version] = bits(model)

    @rule(
        k=st.integers(0, PUBLISHERS - 1), nth=st.integers(1, 4), when=st.sampled_from(["crash-before", "crash-after"])
    )
    def publisher_dies(self, k: int, nth: int, when: str) -> None:
        """A new process takes over from the store, and dies at one of its writes."""
        dying = FaultyStore(self.store, [Fault("write", nth, when)])  # type: ignore[arg-type]
        model = self.move(k)
        newest = max(self.truth, default=0)
        self.publishers[k] = None
        try:
            thinwire.Publisher(dying, single_publisher=True, anchor_every=4).publish(model)
        except SimulatedCrash:
            pass
        committed = [i.key for i in self.store.list(f"manifests/{newest + 1:010d}")]
        if committed:
            self.truth[newest + 1] = bits(model)

    @precondition(lambda self: self.truth)
    @rule(k=st.integers(0, CONSUMERS - 1))
    def worker_starts(self, k: int) -> None:
        consumer = thinwire.Consumer(self.store, poll_s=0.001)
        assert consumer.load(self.served[k], timeout_s=0).version == max(self.truth)
        self.consumers[k] = consumer

    @rule(k=st.integers(0, CONSUMERS - 1), every=st.booleans())
    def worker_follows(self, k: int, every: bool) -> None:
        consumer = self.consumers[k]
        if consumer is None or consumer.version is None:
            return
        before = consumer.version
        version = consumer.poll(every=every)
        assert (version is None) == (before == max(self.truth))
        if version is not None:
            try:
                result = version.apply(self.served[k])
            except NoPathError:  # a version between, whose objects have been collected
                assert every
                return
            assert result.version == version.number == (before + 1 if every else max(self.truth))

    @precondition(lambda self: self.truth)
    @rule(keep=st.integers(1, 3))
    def garbage_is_collected(self, keep: int) -> None:
        collect(self.store, keep_last=keep, grace_s=0, now_s=time.time() + 1)

    @invariant()
    def everybody_holds_some_version_exactly(self) -> None:
        for consumer, model in zip(self.consumers, self.served, strict=True):
            if consumer is not None and consumer.version is not None:
                assert bits(model) == self.truth[consumer.version]


Chain.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestChain = Chain.TestCase

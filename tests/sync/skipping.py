"""Chains with skip deltas, and how consumers of them are watched."""

from __future__ import annotations

import torch

from tests.sync.checkpoints import same
from thinwire import Consumer, Publisher
from thinwire.stores.memory import MemoryStore
from thinwire.testing.faults import FaultyStore
from thinwire.wire.manifest import Manifest, manifest_key

State = dict[str, torch.Tensor]


def publish(store: object, count: int, *, seed: int = 0, start: State | None = None, **how: object) -> list[State]:
    """``count`` versions; returns the state of each. Patches are small beside the state, and overlap."""
    generator = torch.Generator().manual_seed(seed)
    state = start or {"w": torch.randn(20_000, generator=generator).bfloat16(), "b": torch.zeros(7)}
    often = torch.rand(20_000, generator=generator) < 0.02
    states = []
    with Publisher(store, threads=1, **{"anchor_ratio": 100.0, **how}) as publisher:  # type: ignore[arg-type]
        for step in range(count):
            state["w"][often & (torch.rand(20_000, generator=generator) < 0.7)] *= 1.01
            state["b"] += 1
            publisher.publish(state, step=step)
            states.append({name: tensor.clone() for name, tensor in state.items()})
    return states


def copy_of(store: MemoryStore) -> MemoryStore:
    copied = MemoryStore()
    for info in store.list(""):
        copied.put(info.key, [store.get(info.key, size_max=info.size)])
    return copied


def manifest_of(store: MemoryStore, version: int) -> Manifest:
    return Manifest.parse(store.get(manifest_key(version), size_max=1 << 20))


def at(store: object, states: list[State], version: int) -> tuple[Consumer, State]:
    model = {name: torch.empty_like(tensor) for name, tensor in states[0].items()}
    consumer = Consumer(store, retry_s=0, threads=1)  # type: ignore[arg-type]
    consumer.load(model, version=version)
    return consumer, model


def keys(store: object, prefix: str = "") -> set[str]:
    return {info.key for info in store.list(prefix)}  # type: ignore[attr-defined]


def reads(store: FaultyStore, prefix: str) -> list[str]:
    return [op.key for op in store.log if op.verb == "get" and op.key.startswith(prefix)]


def advance(store: object, states: list[State], have: int, to: int | None = None):  # type: ignore[no-untyped-def]
    """Follow from ``have`` to the newest; the result, after comparing the model bit for bit."""
    consumer, model = at(store, states, have)
    version = consumer.poll()
    assert version is not None
    result = version.apply(model)
    assert result.version == (to or len(states))
    assert same(model, states[result.version - 1])
    return result

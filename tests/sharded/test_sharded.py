"""Sharded trainers and readers of any other sharding: every bit arrives, and nothing else is seen."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sharded.fleet import State, Trainer, bits, cut, empty_like, moved, same_bits, shards
from tests.sharded.test_chunking import Spec, specs
from thinwire.stores.memory import MemoryStore
from thinwire.sync.sharded_consumer import ShardedConsumer
from thinwire.sync.shards import Slice
from thinwire.testing.faults import FaultyStore
from thinwire.wire.chunks import Box

KINDS = (torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn, torch.bool)


def state_of_spec(spec: Spec, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for k, (name, (shape, _)) in enumerate(sorted(spec.items())):
        values = torch.randn(shape, generator=generator)
        found[name] = values.to(KINDS[(seed + k) % 3])
    return found


@st.composite
def readers(draw: st.DrawFn, spec: Spec) -> dict[str, Box]:
    """A box of some tensors: what a reader wants."""
    names = draw(st.lists(st.sampled_from(sorted(spec)), unique=True, min_size=1))
    found = {}
    for name in names:
        spans = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in spec[name][0]]
        found[name] = Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
    return found


@settings(max_examples=25)
@given(
    specs, st.sampled_from([1, 2, 3, 4]), st.sampled_from(["small", "smallest"]), st.sampled_from(["ulp", "absolute"]),
    st.integers(1, 40), st.data(),
)  # fmt: skip
def test_any_cutting_and_any_slicing_give_the_exact_bits(
    spec: Spec, size: int, level: str, values: str, group_cells: int, data: st.DataObject
) -> None:
    store = MemoryStore()
    trainer = Trainer(store, size, spec, level=level, values=values, group_cells=group_cells, anchor_ratio=50)
    states = [state_of_spec(spec, 1)]
    trainer.publish(states[0], step=0)
    wanted = data.draw(readers(spec))
    mine = empty_like({name: cut(states[0][name], box) for name, box in wanted.items()})
    consumer = ShardedConsumer(store, partial=True, threads=1)
    consumer.load(mine)
    assert same_bits(mine, states[0])
    whole = {name: torch.zeros_like(tensor) for name, tensor in states[0].items()}
    full = ShardedConsumer(store, threads=1)
    full.load(whole)
    for step in (1, 2):
        states.append(moved(states[-1], step, 0.3))
        trainer.publish(states[-1], step=step)
        version = consumer.poll()
        assert version is not None
        version.apply(mine)
        assert same_bits(mine, states[-1])
    version = full.poll()
    assert version is not None
    assert version.apply(whole).version == 3
    assert all(bits(whole[name]) == bits(tensor) for name, tensor in states[-1].items())
    late = empty_like(mine)
    ShardedConsumer(store, partial=True, threads=1).load(late)
    assert same_bits(late, states[-1])


SPEC: Spec = {
    "embed": ((64, 48), "rows"), "up": ((96, 48), "grid"), "down": ((48, 96), "columns"), "norm": ((48,), "replicated"),
    "bias": ((3,), "rows"), "scale": ((), "replicated"), "stage": ((16, 16), "one rank"),
}  # fmt: skip


def published(size: int, **options: object) -> tuple[MemoryStore, Trainer, State]:
    store, state = MemoryStore(), state_of_spec(SPEC, 0)
    trainer = Trainer(store, size, SPEC, **options)
    trainer.publish(state, step=0)
    return store, trainer, state


def test_a_report_tells_of_all_ranks() -> None:
    store, trainer, state = published(4)
    new = {name: tensor.clone() for name, tensor in state.items()}
    new["up"].view(-1)[::100] += 1
    report = trainer.publish(new, step=1)
    assert (report.version, report.step, report.kind) == (2, 1, "delta")
    assert report.changed == len(new["up"].view(-1)[::100])
    assert report.elements == sum(tensor.numel() for tensor in state.values())
    assert report.full_bytes == sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    keys = [info.key for info in store.list("objects/0000000002")]
    assert len(keys) == 8
    assert report.total_bytes == sum(info.size for info in store.list("")) - sum(
        info.size for info in store.list("") if "0000000001" in info.key or info.key == "latest.json"
    )


def test_what_is_published_in_the_background_is_committed_by_all_ranks_together() -> None:
    store, trainer, state = published(2)
    new = moved(state, 1)
    from functools import partial

    from tests.sharded.threads import together

    futures = together(
        [partial(p.publish, shards(new, SPEC, k, 2), wait=False) for k, p in enumerate(trainer.publishers)]
    )
    assert [future.result(timeout=60).version for future in futures] == [2, 2]
    newer = moved(new, 2)
    assert trainer.publish(newer).version == 3
    mine = empty_like(shards(newer, SPEC, 0, 1))
    ShardedConsumer(store, partial=True).load(mine)
    assert same_bits(mine, newer)
    together([publisher.close for publisher in trainer.publishers])


def test_a_cast_to_the_served_type_is_that_of_torch() -> None:
    spec: Spec = {"w": ((40, 30), "columns"), "n": ((7,), "replicated")}
    state = {"w": torch.randn(40, 30), "n": torch.arange(7)}
    store = MemoryStore()
    trainer = Trainer(store, 3, spec, dtype=torch.bfloat16)
    trainer.publish(state)
    state = {"w": state["w"] * 1.001, "n": state["n"]}
    trainer.publish(state)
    served = {"w": torch.zeros(40, 30, dtype=torch.bfloat16), "n": torch.zeros(7, dtype=torch.int64)}
    ShardedConsumer(store).load(served)
    assert torch.equal(served["w"], state["w"].bfloat16())
    assert torch.equal(served["n"], state["n"])


def test_tied_tensors_arrive_tied_or_not() -> None:
    store, weight = MemoryStore(), torch.randn(8, 6)
    trainer = Trainer(store, 1, {})
    model = {"a": weight, "b": weight}
    trainer.publishers[0].publish(model)
    tied = torch.zeros(8, 6)
    apart = {"a": torch.zeros(8, 6), "b": torch.zeros(8, 6)}
    consumers = [ShardedConsumer(store) for _ in range(2)]
    consumers[0].load({"a": tied, "b": tied})
    consumers[1].load(apart)
    weight += 1
    trainer.publishers[0].publish(model)
    for consumer, mine in zip(consumers, ({"a": tied, "b": tied}, apart), strict=True):
        version = consumer.poll()
        assert version is not None
        version.apply(mine)
        assert torch.equal(mine["a"], weight)
        assert torch.equal(mine["b"], weight)


def test_a_reader_with_half_of_a_tensor_keeps_the_rest_of_its_chunks_beside() -> None:
    store, trainer, state = published(1)
    kind = state["up"].dtype
    mine = {"up": Slice(torch.zeros(96, 7, dtype=kind), (0, 5), (96, 48))}
    consumer = ShardedConsumer(store, partial=True)
    consumer.load(mine)
    assert consumer.beside_bytes >= state["up"].numel() * state["up"].element_size()
    rows = {"up": Slice(torch.zeros(96, 48, dtype=kind), (0, 0), (96, 48))}
    other = ShardedConsumer(store, partial=True)
    other.load(rows)
    assert other.beside_bytes < consumer.beside_bytes
    state = moved(state, 5)
    trainer.publish(state)
    for reader, held in ((consumer, mine), (other, rows)):
        version = reader.poll()
        assert version is not None
        version.apply(held)
        assert same_bits(held, state)


def test_workers_of_one_machine_share_a_cache(tmp_path: Path) -> None:
    spec: Spec = {"a": ((300, 200), "rows"), "n": ((50,), "replicated")}
    store, old = MemoryStore(), state_of_spec(spec, 0)
    trainer, origin = Trainer(store, 2, spec, anchor_ratio=100), FaultyStore(store)
    trainer.publish(old, step=0)
    new = moved(old, 1)

    def asked() -> Counter[str]:
        return Counter(done.key for done in origin.log if done.verb == "get" and done.fault is None)

    readers = []
    for _ in range(3):
        mine = empty_like(shards(old, spec, 0, 1))
        readers.append((ShardedConsumer(origin, threads=1, poll_s=0.8, cache=tmp_path), mine))
    for consumer, mine in readers:
        consumer.load(mine)
        assert same_bits(mine, old)
    trainer.publish(new, step=1)
    time.sleep(0.25)  # that it is absent is shared for a quarter of the poll interval
    for consumer, mine in readers:
        with consumer:
            version = consumer.poll()
            assert version is not None
            version.apply(mine)
        assert same_bits(mine, new)
    for key, count in asked().items():
        assert count == 1 or not key.startswith(("objects/", "manifests/0000000001")), key

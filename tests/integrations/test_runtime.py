"""Sparse patches written into an engine's fused tensors: the same bits as its own loader puts there."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.integrations.chains import CHAINS
from tests.integrations.engines import Engine, checkpoint
from thinwire.errors import DamagedObjectError, MisuseError, NoPathError
from thinwire.integrations.runtime_map import probe
from thinwire.integrations.runtime_sync import RuntimeSync
from thinwire.stores.memory import MemoryStore
from thinwire.sync.layout import Layout
from thinwire.tensors.bits import cells_of, dtype_of_tensor, shape_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=CHAINS)
def chain(request: pytest.FixtureRequest) -> Any:
    """Makes a publisher: of whole versions, or ranks that publish them in parts."""
    return CHAINS[request.param]


def layouts_of(tensors: dict[str, Tensor]) -> dict[str, Layout]:
    return {name: Layout(dtype_of_tensor(tensor), shape_of(tensor)) for name, tensor in tensors.items()}


def bits(engine: Engine) -> dict[str, Any]:
    return {name: cells_of(tensor).tolist() for name, tensor in engine.tensors.items()}


def stepped(weights: dict[str, Tensor], seed: int, share: float = 0.1) -> None:
    """Change some of every tensor; also to -0.0, NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in {id(t): t for t in weights.values()}.values():
        chosen = torch.rand(tensor.shape, generator=generator) < share
        tensor[chosen] *= 1.5
    weights["model.layers.0.q_proj.weight"][0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])


def loaded(weights: dict[str, Tensor], rank: int, ranks: int) -> Engine:
    """The oracle: an engine that loads this version afresh."""
    engine = Engine(rank=rank, ranks=ranks)
    engine.load_weights(weights.items())
    return engine


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_an_engine_follows_a_chain_as_if_it_had_loaded_each_version(chain: Any, rank: int, ranks: int) -> None:
    store, weights = MemoryStore(), checkpoint(0)
    publisher = chain(store, anchor_ratio=100)
    publisher.publish(weights, step=0)
    engine = Engine(rank=rank, ranks=ranks)
    places = {name: tensor.data_ptr() for name, tensor in engine.tensors.items()}
    sync = RuntimeSync(store, engine.tensors, engine.load_weights)
    opened = sync.open()
    assert (opened.version, opened.elements, opened.loaded) == (1, 0, 0)
    assert torch.equal(engine.tensors["scale"], torch.full((1,), 7.0))  # its own
    assert not sync.map.unmapped
    assert sync.map.unused == {"model.layers.0.rotary_emb.inv_freq"}
    assert bits(engine) == bits(loaded(weights, rank, ranks))
    for step in range(1, 5):
        stepped(weights, step)
        report = publisher.publish(weights, step=step)
        before = bits(engine)
        assert sync.prepare() == step + 1
        assert bits(engine) == before  # the engine serves meanwhile
        swapped = sync.swap()
        assert swapped is not None
        assert (swapped.version, swapped.step, swapped.digest) == (step + 1, step, report.digest)
        assert swapped.elements > 0
        assert bits(engine) == bits(loaded(weights, rank, ranks))
        sync.verify()
    assert sync.swap() is None
    assert sync.prepare() is None
    assert places == {name: tensor.data_ptr() for name, tensor in engine.tensors.items()}


def test_probing_leaves_the_engine_as_it_was_and_finds_every_element() -> None:
    weights = checkpoint(0)
    engine = loaded(weights, 1, 2)
    before = bits(engine)
    found = probe(engine.tensors, engine.load_weights, layouts_of(weights))
    assert bits(engine) == before
    for name, tensor in weights.items():
        if name not in found.unused:
            assert found.agrees(name, cells_of(tensor))
    assert not found.agrees("model.layers.0.k_proj.weight", cells_of(weights["model.layers.0.v_proj.weight"]))
    assert [p.rows for p in found.pieces["model.layers.1.experts.2.up_proj.weight"]] == [(25, 30)]
    assert [p.source_columns.tolist() for p in found.pieces["model.layers.0.o_proj.weight"]] == [list(range(8, 16))]


def test_several_versions_at_once_go_in_as_one_and_a_swap_may_wait(chain: Any) -> None:
    store, weights = MemoryStore(), checkpoint(1)
    publisher = chain(store, anchor_ratio=100)
    publisher.publish(weights)
    engine = Engine()
    sync = RuntimeSync(store, engine.tensors, engine.load_weights)
    sync.open()
    for step in range(2, 7):
        stepped(weights, step)
        publisher.publish(weights)
        if step in (3, 5):
            assert sync.prepare() == step
    with pytest.raises(MisuseError, match="swap first"):
        sync.verify()
    assert sync.prepare(version=6) == 6
    assert sync.prepare(version=2) == 6  # never back
    assert sync.newest() == 6
    report = sync.swap()
    assert report is not None
    assert report.version == 6
    assert bits(engine) == bits(loaded(weights, 0, 1))
    with pytest.raises(NoPathError, match="no version 9"):
        sync.prepare(version=9)


def test_an_anchor_in_between_is_written_whole(chain: Any) -> None:
    store, weights = MemoryStore(), checkpoint(2)
    publisher = chain(store, anchor_every=1)
    publisher.publish(weights)
    engine = Engine()
    sync = RuntimeSync(store, engine.tensors, engine.load_weights)
    sync.open()
    stepped(weights, 1)
    publisher.publish(weights)
    for info in list(store.list("objects/0000000002")):
        if info.key.endswith("delta.safetensors"):
            store.delete(info.key)
    assert sync.prepare() == 2
    report = sync.swap()
    assert report is not None
    assert report.whole > 0
    assert bits(engine) == bits(loaded(weights, 0, 1))


class Odd(Engine):
    """An engine that computes some of what it loads."""

    def plain(self, parameter: Tensor, tensor: Tensor) -> None:
        parameter.data.copy_(tensor + 1 if parameter.dim() == 1 else tensor)  # norms, as Gemma has them

    def by_columns(self, parameter: Tensor, tensor: Tensor) -> None:
        parameter.data.copy_(tensor.flip(0, 1) if parameter.shape[1] == 16 else tensor)  # permuted, yet copied


def test_what_the_loader_computes_goes_through_it_and_the_rest_does_not(chain: Any) -> None:
    store, weights = MemoryStore(), checkpoint(3)
    publisher = chain(store, anchor_ratio=100)
    publisher.publish(weights)
    engine, asked = Odd(), []

    def load(pairs: Iterator[tuple[str, Tensor]]) -> object:
        held = list(pairs)
        asked.append([name for name, _ in held])
        return engine.load_weights(held)

    sync = RuntimeSync(store, engine.tensors, load)
    sync.open()
    through = ["model.layers.0.norm.weight", "model.layers.0.rotary_emb.inv_freq"]  # of the second nobody can say
    assert sync.map.unmapped == set(through)
    asked.clear()
    stepped(weights, 1)
    publisher.publish(weights)
    sync.prepare()
    report = sync.swap()
    assert report is not None
    assert (report.loaded, asked) == (2, [through])
    oracle = Odd()
    oracle.load_weights(weights.items())
    assert bits(engine) == bits(oracle)
    sync.verify()
    engine.tensors["layers.0.o_proj.weight"].data[3, 3] += 1
    with pytest.raises(DamagedObjectError, match=r"1 tensors.*layers\.0\.o_proj"):
        sync.verify()
    sync.rewrite()
    sync.verify()
    assert bits(engine) == bits(oracle)


def test_a_checkpoint_of_another_type_is_loaded_through_the_loader(chain: Any) -> None:
    weights = checkpoint(0, dtype=torch.float32)
    store, engine = MemoryStore(), Engine()
    chain(store).publish(weights)
    sync = RuntimeSync(store, engine.tensors, engine.load_weights)
    sync.open()
    assert "model.layers.0.q_proj.weight" in sync.map.unmapped
    assert "model.layers.1.router.weight" in sync.map.pieces
    assert bits(engine) == bits(loaded(weights, 0, 1))


def test_a_loader_that_takes_nothing_or_fails_is_refused_and_the_engine_is_as_it_was() -> None:
    weights = checkpoint(0)
    engine = loaded(weights, 0, 1)
    before = bits(engine)
    with pytest.raises(MisuseError, match="another model"):
        probe(engine.tensors, lambda pairs: list(pairs), layouts_of(weights))
    with pytest.raises(MisuseError, match=r"KeyError.*unheard"):
        probe(engine.tensors, engine.load_weights, layouts_of({"unheard.weight": torch.ones(2)}))
    assert bits(engine) == before
    sync = RuntimeSync(MemoryStore(), engine.tensors, engine.load_weights)
    with pytest.raises(MisuseError, match="open the store first"):
        sync.prepare()


def test_preparing_and_swapping_in_two_threads_never_mixes_versions(chain: Any) -> None:
    store, weights = f"memory://{uuid.uuid4().hex}", checkpoint(4)
    publisher = chain(store, anchor_ratio=1000)
    publisher.publish(weights)
    engine = Engine()
    sync = RuntimeSync(store, engine.tensors, engine.load_weights)
    sync.open()
    kept, stop = {1: bits(engine)}, threading.Event()

    def prepare() -> None:
        while not stop.is_set():
            sync.prepare()

    thread = threading.Thread(target=prepare)
    thread.start()
    try:
        for version in range(2, 12):
            stepped(weights, version)
            publisher.publish(weights)
            kept[version] = bits(loaded(weights, 0, 1))
            report = sync.swap()
            if report is not None:
                assert bits(engine) == kept[report.version]
    finally:
        stop.set()
        thread.join()
    while sync.at is not None and sync.at.version < 11:
        sync.prepare()
        sync.swap()
    assert bits(engine) == kept[11]


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.uint8]


@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    order=st.randoms(use_true_random=False),
    cut=st.integers(1, 300),
)
def test_any_stack_of_slices_in_any_order_is_found(
    rows: list[int], width: int, dtype: torch.dtype, order: Any, cut: int
) -> None:
    """The law: for every position of every tensor, writing through the map is loading the changed tensor."""
    names = [f"part.{k}" for k in range(len(rows))]
    shuffled = list(names)
    order.shuffle(shuffled)
    first, columns = {}, min(cut, width)
    for name in shuffled:
        first[name] = sum(rows[names.index(other)] for other in list(first))
    fused = torch.zeros(sum(rows) + 3, columns, dtype=dtype)  # three rows stay empty

    def load(pairs: Iterator[tuple[str, Tensor]]) -> None:
        for name, tensor in pairs:
            fused[first[name] : first[name] + len(tensor)].copy_(tensor[:, width - columns :])

    tensors = {name: torch.randint(0, 16, (n, width)).to(dtype) for name, n in zip(names, rows, strict=True)}
    load(iter(tensors.items()))
    before = fused.clone()
    found = probe({"fused": fused}, load, layouts_of(tensors))
    assert not found.unmapped
    assert torch.equal(fused.view(torch.uint8), before.view(torch.uint8))
    name = order.choice(names)
    tensor = tensors[name]
    positions = torch.randperm(tensor.numel())[: max(tensor.numel() // 7, 1)].sort().values
    flat = tensor.reshape(-1).float()
    flat[positions] = 5
    tensors[name] = flat.to(dtype).reshape(tensor.shape)
    found.scatter(name, positions.numpy(), cells_of(tensors[name])[positions.numpy()])
    result = fused.clone()
    load(iter(tensors.items()))
    assert torch.equal(result.view(torch.uint8), fused.view(torch.uint8))

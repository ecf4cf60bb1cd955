"""Publishing and following: what a user does, on healthy stores."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import Future

import numpy as np
import pytest
import torch

import thinwire
from tests.sync.models import DTYPES, bits, nudge, small_model
from thinwire.errors import ConflictError, MisuseError, NoPathError, StoreUnavailableError, UnsafeStoreError
from thinwire.stores.memory import MemoryStore
from thinwire.testing.faults import FaultyStore

LEVELS = ["fast", "small", "smallest"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("values", ["ulp", "absolute"])
def test_workers_hold_what_the_trainer_published(level: str, values: str) -> None:
    store, model = MemoryStore(), small_model()
    publisher = thinwire.Publisher(store, level=level, values=values)
    publisher.publish(model, step=0)
    worker = small_model(seed=9)
    consumer = thinwire.Consumer(store)
    assert consumer.load(worker).version == 1
    for step in range(1, 6):
        nudge(model, step)
        report = publisher.publish(model, step=step, metadata={"reward": "0.5"})
        version = consumer.poll()
        assert version is not None
        assert (version.number, version.step, version.metadata) == (step + 1, step, {"reward": "0.5"})
        result = version.apply(worker)
        assert result.digest == report.digest
        assert bits(worker) == bits(model)
        assert result.path == "delta"
        assert result.bytes_fetched == report.patch_bytes < report.full_bytes / 5
    assert consumer.poll() is None
    late = small_model(seed=8)
    result = thinwire.Consumer(store).load(late)
    assert (result.version, result.hops) == (6, 5)
    assert bits(late) == bits(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_follows(dtype: torch.dtype) -> None:
    store = MemoryStore()
    old = {"w": torch.arange(24).reshape(4, 6).to(dtype), "x": torch.tensor(True)}
    new = {"w": old["w"].clone(), "x": torch.tensor(False)}
    new["w"][1, 2] = 0
    publisher = thinwire.Publisher(store)
    publisher.publish(old)
    held = {k: torch.empty_like(v) for k, v in old.items()}
    consumer = thinwire.Consumer(store)
    consumer.load(held)
    publisher.publish(new)
    version = consumer.poll()
    assert version is not None
    version.apply(held)
    assert torch.equal(held["w"], new["w"])
    assert not held["x"]


def test_fp32_masters_are_published_as_they_are_served() -> None:
    store, masters = MemoryStore(), small_model(dtype=torch.float32)
    publisher = thinwire.Publisher(store, dtype=torch.bfloat16)
    publisher.publish(masters)
    served = small_model(seed=5)
    consumer = thinwire.Consumer(store)
    consumer.load(served)
    nudge(masters, 1)
    publisher.publish(masters)
    version = consumer.poll()
    assert version is not None
    version.apply(served)
    assert bits(served) == bits(copy.deepcopy(masters).to(torch.bfloat16))


def test_follow_yields_the_newest_or_every_version() -> None:
    store, model = MemoryStore(), small_model()
    publisher = thinwire.Publisher(store)
    publisher.publish(model)
    newest, every = thinwire.Consumer(store, poll_s=0.01), thinwire.Consumer(store, poll_s=0.01)
    a, b = small_model(1), small_model(2)
    newest.load(a)
    every.load(b)
    for step in range(4):
        nudge(model, step)
        publisher.publish(model, step=step)
    seen = []
    for version in newest.follow(timeout_s=0.05):
        seen.append(version.number)
        version.apply(a)
    assert seen == [5]
    seen = []
    for version in every.follow(every=True, timeout_s=0.05):
        seen.append(version.number)
        version.apply(b)
    assert seen == [2, 3, 4, 5]
    assert bits(a) == bits(b) == bits(model)


def test_follow_wakes_up_when_a_version_appears() -> None:
    store, model = MemoryStore(), small_model()
    publisher = thinwire.Publisher(store)
    publisher.publish(model)
    worker, consumer = small_model(3), thinwire.Consumer(store, poll_s=0.02)
    consumer.load(worker)
    follower = consumer.follow(timeout_s=60)

    def later() -> None:
        nudge(model, 1)
        publisher.publish(model, step=7)

    timer = threading.Timer(0.1, later)
    timer.start()
    version = next(follower)
    timer.join()
    assert version.step == 7


def test_load_waits_for_the_first_version_and_then_gives_up() -> None:
    consumer = thinwire.Consumer(MemoryStore(), poll_s=0.01)
    with pytest.raises(StoreUnavailableError, match="publisher"):
        consumer.load(small_model(), timeout_s=0.05)


def test_an_older_version_can_be_loaded_and_a_missing_one_says_so() -> None:
    store, model = MemoryStore(), small_model()
    publisher = thinwire.Publisher(store)
    states = []
    for step in range(4):
        nudge(model, step)
        publisher.publish(model)
        states.append(bits(model))
    worker = small_model(4)
    for version in (3, 1, 2):
        thinwire.Consumer(store).load(worker, version=version)
        assert bits(worker) == states[version - 1]
    with pytest.raises(NoPathError, match="no version 9"):
        thinwire.Consumer(store).load(worker, version=9)


# --- background, resume, conflict ----------------------------------------------------------------------------------


def test_publishing_in_the_background_lets_training_go_on() -> None:
    gate = threading.Event()
    slow = FaultyStore(MemoryStore(), latency_s=0.001, sleep=lambda _: gate.wait(60))
    model = small_model()
    publisher = thinwire.Publisher(slow, single_publisher=True)
    gate.set()
    publisher.publish(model)
    gate.clear()
    nudge(model, 1)
    threading.Timer(0.2, gate.set).start()
    future = publisher.publish(model, step=1, wait=False)
    assert isinstance(future, Future)
    published = bits(model)
    nudge(model, 2)  # while the upload stands still
    report = future.result(60)
    worker = small_model(7)
    assert thinwire.Consumer(slow).load(worker).digest == report.digest
    assert bits(worker) == published != bits(model)
    publisher.close()


def test_at_most_one_version_is_under_way() -> None:
    store, model = MemoryStore(), small_model()
    with thinwire.Publisher(store) as publisher:
        futures = []
        for step in range(5):
            nudge(model, step)
            futures.append(publisher.publish(model, step=step, wait=False))
            assert all(f.done() for f in futures[:-1])
        assert publisher.flush() is not None
    assert [f.result().version for f in futures] == [1, 2, 3, 4, 5]


def test_a_new_publisher_goes_on_without_a_full_anchor() -> None:
    store, model = MemoryStore(), small_model()
    thinwire.Publisher(store).publish(model)
    same = thinwire.Publisher(store).publish(model)
    assert (same.kind, same.changed, same.version) == ("delta", 0, 2)
    nudge(model, 1)
    other = thinwire.Publisher(store).publish(model)
    assert (other.kind, other.version) == ("delta", 3)
    worker = small_model(3)
    thinwire.Consumer(store).load(worker)
    assert bits(worker) == bits(model)


def test_of_two_publishers_one_wins_and_the_other_is_told() -> None:
    store, mine, other = MemoryStore(), small_model(1), small_model(2)
    first, second = thinwire.Publisher(store), thinwire.Publisher(store)
    first.publish(mine)
    second.publish(other)
    nudge(mine, 1)
    with pytest.raises(ConflictError, match="start a new Publisher"):
        first.publish(mine)
    worker = small_model(3)
    assert thinwire.Consumer(store).load(worker).version == 2
    assert bits(worker) == bits(other)


def test_many_publishers_racing_make_one_chain() -> None:
    store = MemoryStore()
    thinwire.Publisher(store).publish(small_model())
    wins: list[tuple[int, str]] = []
    barrier = threading.Barrier(6)

    def race(seed: int) -> None:
        publisher = thinwire.Publisher(store)
        model = small_model(seed)
        barrier.wait()
        try:
            report = publisher.publish(model)
            wins.append((report.version, report.digest))
        except ConflictError:
            pass

    threads = [threading.Thread(target=race, args=(seed,)) for seed in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(v for v, _ in wins) == list(range(2, len(wins) + 2))
    consumer = thinwire.Consumer(store)
    for version, digest in wins:
        assert consumer.fetch(version=version).digest == digest


def test_a_store_without_create_only_writes_is_refused_unless_told() -> None:
    store = FaultyStore(MemoryStore())
    store.inner.create = lambda key, data: store.inner.put(key, data)  # type: ignore[method-assign]
    with pytest.raises(UnsafeStoreError, match="single_publisher"):
        thinwire.Publisher(store).publish(small_model())
    assert thinwire.Publisher(store, single_publisher=True).publish(small_model()).version == 1


# --- anchors -------------------------------------------------------------------------------------------------------


def test_an_anchor_is_written_when_the_patches_cost_more_than_it() -> None:
    store, model = MemoryStore(), small_model()
    publisher = thinwire.Publisher(store, anchor_ratio=0.2)
    reports = []
    for step in range(12):
        nudge(model, step, share=0.1)
        reports.append(publisher.publish(model))
    anchors = [r.version for r in reports if "anchor" in r.kind]
    assert len(anchors) >= 3
    since = 0
    for report in reports[1:]:
        since += report.patch_bytes
        assert ("anchor" in report.kind) == (since > 0.2 * report.full_bytes)
        if "anchor" in report.kind:
            since = 0
    result = thinwire.Consumer(store).load(small_model(1))
    assert result.hops == 12 - anchors[-1]


def test_an_anchor_is_a_checkpoint_in_shards_that_safetensors_opens() -> None:
    from safetensors.torch import load

    store, model = MemoryStore(), small_model()
    thinwire.Publisher(store, shard_bytes_max=5000).publish(model)
    found: dict[str, torch.Tensor] = {}
    names = [i.key for i in store.list("objects/") if i.key.endswith("safetensors")]
    for name in names:
        found |= load(store.get(name, size_max=1 << 20))
    assert len(names) > 2
    assert names[0].endswith(f"model-00001-of-{len(names):05d}.safetensors")
    assert torch.equal(found["a.weight"], model["a"].weight)
    worker = small_model(2)
    thinwire.Consumer(store).load(worker)
    assert bits(worker) == bits(model)


# --- models ----------------------------------------------------------------------------------------------------------


def test_tensors_that_are_no_plain_views_follow_too() -> None:
    store, base = MemoryStore(), torch.arange(12.0).reshape(3, 4)
    publisher = thinwire.Publisher(store)
    publisher.publish({"t": base.t().contiguous(), "s": base[:, 1].contiguous()})
    memory = torch.zeros(3, 4)
    held = {"t": torch.zeros(3, 4).t(), "s": memory[:, 1]}
    consumer = thinwire.Consumer(store)
    consumer.load(held)
    base[1, 1] = -7
    publisher.publish({"t": base.t().contiguous(), "s": base[:, 1].contiguous()})
    version = consumer.poll()
    assert version is not None
    version.apply(held)
    assert torch.equal(held["t"], base.t())
    assert torch.equal(memory[:, 1], base[:, 1])
    assert not memory[:, 0].any()


def test_overlapping_tensors_are_exact_when_the_trainer_shares_them_too() -> None:
    store = MemoryStore()
    trained = torch.randn(6, 6)
    publisher = thinwire.Publisher(store)
    publisher.publish({"a": trained, "b": trained.t()})
    mine = torch.zeros(6, 6)
    held = {"a": mine, "b": mine.t()}
    consumer = thinwire.Consumer(store)
    consumer.load(held)
    assert torch.equal(mine, trained)
    trained[2, 3] += 1
    publisher.publish({"a": trained, "b": trained.t()})
    version = consumer.poll()
    assert version is not None
    version.apply(held)
    assert torch.equal(mine, trained)


def test_a_worker_that_does_not_tie_weights_gets_them_twice() -> None:
    store, model = MemoryStore(), small_model()
    publisher = thinwire.Publisher(store)
    publisher.publish(model)
    worker = small_model(1)
    worker["head"].weight = torch.nn.Parameter(torch.zeros_like(worker["embed"].weight))
    consumer = thinwire.Consumer(store)
    consumer.load(worker)
    nudge(model, 1)
    publisher.publish(model)
    version = consumer.poll()
    assert version is not None
    version.apply(worker)
    assert torch.equal(worker["head"].weight, model["head"].weight)
    assert torch.equal(worker["embed"].weight, model["embed"].weight)


@pytest.mark.parametrize("wrong", ["dtype", "shape", "missing", "additional"])
def test_a_model_of_another_kind_is_refused_untouched(wrong: str) -> None:
    store = MemoryStore()
    thinwire.Publisher(store).publish({"w": torch.ones(4), "b": torch.ones(2)})
    held = {"w": torch.zeros(4), "b": torch.zeros(2)}
    if wrong == "dtype":
        held["w"] = torch.zeros(4, dtype=torch.float64)
    elif wrong == "shape":
        held["w"] = torch.zeros(2, 2)
    elif wrong == "missing":
        del held["b"]
    else:
        held["c"] = torch.zeros(1)
    with pytest.raises(MisuseError):
        thinwire.Consumer(store).load(held)
    assert not any(t.any() for t in held.values())


def test_a_model_that_was_changed_behind_our_back_is_brought_back_by_the_anchor() -> None:
    store, model = MemoryStore(), small_model()
    publisher = thinwire.Publisher(store)
    publisher.publish(model)
    watched = FaultyStore(store)
    worker, consumer = small_model(1), thinwire.Consumer(watched)
    consumer.load(worker)
    with torch.no_grad():
        worker["a"].weight[0, 0] += 1
    before = len(watched.log)
    nudge(model, 1)
    publisher.publish(model)
    version = consumer.poll()
    assert version is not None
    result = version.apply(worker)
    assert result.path == "anchor+delta"
    assert bits(worker) == bits(model)
    anchors = [o for o in watched.log[before:] if o.verb == "get" and "model" in o.key]
    assert len(anchors) == 1  # fetched once, not once to plan and once to build


def test_tensors_may_come_go_and_change_shape_for_who_loads() -> None:
    store = MemoryStore()
    publisher = thinwire.Publisher(store)
    states = [
        {"a": torch.ones(3), "b": torch.zeros(2)},
        {"a": torch.ones(3), "c": torch.arange(4)},
        {"a": torch.ones(3, 1), "c": torch.arange(4).bfloat16()},
    ]
    for k, state in enumerate(states):
        publisher.publish(state)
        held = {n: torch.empty_like(t) for n, t in state.items()}
        consumer = thinwire.Consumer(store)
        assert consumer.load(held).version == k + 1
        assert all(torch.equal(held[n], t) for n, t in state.items())


def test_sha256_chains_work_and_are_not_mixed_with_others() -> None:
    store, model = MemoryStore(), small_model()
    thinwire.Publisher(store, hash="sha256").publish(model)
    nudge(model, 1)
    thinwire.Publisher(store, hash="sha256").publish(model)
    worker = small_model(1)
    assert thinwire.Consumer(store).load(worker).hops == 1
    assert bits(worker) == bits(model)
    with pytest.raises(MisuseError, match="sha256"):
        thinwire.Publisher(store).publish(model)


def test_the_tree_tells_which_tensor_diverged() -> None:
    store, model = MemoryStore(), small_model()
    thinwire.Publisher(store).publish(model)
    consumer = thinwire.Consumer(store)
    consumer.load(small_model(1))
    tree = consumer.tree()
    assert tree is not None
    assert tree.digest == consumer.digest
    assert "a.weight" in tree.tensors


@pytest.mark.parametrize(
    "arguments", [{"level": "tiny"}, {"values": "xor"}, {"hash": "md5"}, {"anchor_ratio": 0}, {"anchor_every": 0}]
)
def test_wrong_arguments_say_what_is_right(arguments: dict[str, object]) -> None:
    with pytest.raises(MisuseError):
        thinwire.Publisher("memory://misuse", **arguments)  # type: ignore[arg-type]


def test_tensors_off_the_host_get_only_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nothing is a view of host memory, and changes are scattered."""
    from thinwire.sync import target as target_module

    monkeypatch.setattr(target_module, "is_host_view", lambda tensor: False)
    scattered: list[int] = []
    real = target_module.scatter_

    def counting(tensor: torch.Tensor, positions: np.ndarray, cells: np.ndarray) -> None:
        scattered.append(positions.size)
        real(tensor, positions, cells)

    monkeypatch.setattr(target_module, "scatter_", counting)
    store, model = MemoryStore(), small_model()
    publisher = thinwire.Publisher(store, level="smallest")
    publisher.publish(model)
    worker, consumer = small_model(1), thinwire.Consumer(store)
    consumer.load(worker)
    nudge(model, 1)
    report = publisher.publish(model)
    version = consumer.poll()
    assert version is not None
    version.apply(worker)
    assert bits(worker) == bits(model)
    assert sum(scattered) == report.changed

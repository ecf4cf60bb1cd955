"""The broadcast inside a process group: three real gloo ranks, processes of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.processes import Meeting, Workers
from thinwire.errors import MisuseError
from thinwire.testing.peers import CarrierContract, Party

KEY = "objects/0000000001-ab/delta.safetensors"


def make_collective(rank: int, size: int) -> Any:
    import torch.distributed as dist

    from thinwire.peers.collective import Collective

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Collective(timeout_s=30.0)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers(3)
    yield started
    started.close()


class TestContract(CarrierContract):
    @pytest.fixture(autouse=True)
    def _workers(self, workers: Workers) -> None:
        self.workers = workers

    def run(self, scenario: Callable[..., Any], *args: Any) -> list[Any]:
        return self.workers.play(make_collective, scenario, *args)


def read_in_turn(party: Party) -> tuple[bool, int, int]:
    """Ranks that are out of step: nobody has offered anything, each asks when it likes."""
    data = bytes(range(256)) * 5000
    if party.rank == 0:
        party.origin.put(KEY, [data])
    party.meet()
    time.sleep(0.2 * party.rank)
    got = party.fetch(KEY, len(data))
    party.meet()
    carrier: Any = party.carrier
    return got == data, carrier.sent_bytes, carrier.received_bytes


def test_an_object_leaves_the_store_once_though_ranks_are_out_of_step(workers: Workers) -> None:
    size = 256 * 5000
    found = workers.play(make_collective, read_in_turn)
    assert [fine for fine, _, _ in found] == [True] * 3
    assert found[0][1] == found[1][2] == size  # one broadcast


def leave_early(party: Party) -> list[bool]:
    """The last rank leaves: the others soon find nobody, and hang nowhere."""
    if party.rank == 0:
        party.origin.put(KEY, [b"weights"])
    party.meet()
    if party.rank == party.size - 1:
        party.carrier.leave()
    party.meet()
    began = time.monotonic()
    data = party.fetch(KEY, 7)
    soon = time.monotonic() - began < 20
    party.meet()
    return [soon, data in (None, b"weights")]


def test_when_a_rank_leaves_the_others_go_on_with_the_store(workers: Workers) -> None:
    for found in workers.play(make_collective, leave_early):
        assert all(found)


def follow(rank: int, size: int, folder: str) -> list[tuple[int, str]]:
    """Rank 0 trains and publishes, the others serve: each version comes by broadcast."""
    import torch

    from thinwire import Consumer, Publisher
    from thinwire.sync.peering import PeerStore

    carrier, meet = make_collective(rank, size), Meeting(Path(folder), rank, size)
    torch.set_num_threads(1)
    store, seen = str(Path(folder) / "store"), []
    model = {"w": torch.zeros(50_000).bfloat16()}
    if rank == 0:
        generator = torch.Generator().manual_seed(0)
        publisher = Publisher(store, peers=carrier)
        for step in range(4):
            where = torch.randint(0, 50_000, (500,), generator=generator)
            model["w"][where] += 1 + step
            report = publisher.publish(model, step=step)
            seen.append((report.version, report.digest))
            meet()  # published
            meet()  # followed
        publisher.close()
        return seen
    consumer = Consumer(store, peers=carrier, threads=1)
    for step in range(4):
        meet()
        if step == 0:
            result = consumer.load(model)
        else:
            version = consumer.poll()
            assert version is not None
            result = version.apply(model)
        seen.append((result.version, result.digest))
        meet()
    assert isinstance(consumer._peered, PeerStore)
    assert consumer._peered.store_bytes == 0
    assert consumer._peered.peer_bytes > 100_000
    consumer.close()
    return seen


def test_engine_ranks_follow_a_trainer_in_their_group(workers: Workers, tmp_path: Path) -> None:
    trainer, *engines = workers.run(follow, str(tmp_path))
    assert engines == [trainer, trainer]
    assert len(trainer) == 4


def misuse(rank: int, size: int) -> list[str]:
    import torch.distributed as dist

    from thinwire.peers.collective import Collective
    from thinwire.stores.memory import MemoryStore

    said = []
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    for wrong in ({"source": 3}, {"timeout_s": 0}):
        try:
            Collective(**wrong)  # type: ignore[arg-type]
        except MisuseError as error:
            said.append(str(error))
    carrier = Collective(source=1)
    try:
        carrier.join(MemoryStore(), publishing=True)
        carrier.leave()
        said.append("joined")
    except MisuseError as error:
        said.append(str(error))
    return said


def test_misuse_is_told(workers: Workers) -> None:
    for rank, (source, timeout, joined) in enumerate(workers.run(misuse)):
        assert "source 3" in source
        assert "above 0" in timeout
        assert joined == "joined" if rank == 1 else "must be the source" in joined


def test_without_a_process_group_it_says_what_to_call() -> None:
    from thinwire.peers.collective import Collective

    with pytest.raises(MisuseError, match="init_process_group"):
        Collective()

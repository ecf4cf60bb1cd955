"""Four processes over Gloo: FSDP2 trains, tensor parallelism serves, others go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integrations.pool import RankPool
from tests.sharded import models
from thinwire.errors import MisuseError
from thinwire.stores.local import LocalStore
from thinwire.sync.consumer import Consumer
from thinwire.sync.publisher import Publisher
from thinwire.sync.sharded_consumer import ShardedConsumer

WAIT_S = 400.0
pytestmark = pytest.mark.timeout(1200)


def plain(folder: Path) -> tuple[ShardedConsumer, models.Net]:
    model = models.Net(seed=5).bfloat16()
    consumer = ShardedConsumer(LocalStore(folder), threads=1)
    consumer.load(model)
    return consumer, model


def test_fsdp_trains_tensor_parallelism_serves_and_another_world_size_goes_on(tmp_path: Path, ranks: RankPool) -> None:
    answers = ranks.run(4, models.train_and_serve, str(tmp_path), timeout_s=WAIT_S)
    for answer in answers:
        assert answer["first"] == "anchor"
        assert answer["same"] == [True, True, True]
        assert answer["keys"] == 8
    assert len({answer["print"] for answer in answers}) == 1
    consumer, model = plain(tmp_path)
    assert models.fingerprint(model.state_dict()) == answers[0]["print"]
    with pytest.raises(MisuseError, match="ShardedConsumer"):
        Consumer(LocalStore(tmp_path)).load(model)
    with pytest.raises(MisuseError, match="ShardedPublisher"):
        Publisher(LocalStore(tmp_path)).publish(model)

    later = ranks.run(2, models.go_on, str(tmp_path), "fsdp", timeout_s=WAIT_S)
    for answer in later:
        assert answer["loaded"] == answers[0]["print"]
        assert answer["unchanged"] == 0, "the old state, cut anew, is the base: nothing of it goes up as changed"
        assert answer["kinds"] == ["delta+anchor", "delta", "delta"]
        assert answer["again"] == 0
    version = consumer.poll()
    assert version is not None
    assert version.apply(model).version == 6
    assert models.fingerprint(model.state_dict()) == later[0]["print"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hsdp", "fsdp and tp", "replicated"])
def test_other_meshes_go_on_from_each_other(tmp_path: Path, ranks: RankPool, kind: str) -> None:
    answers = ranks.run(4, models.train_and_serve, str(tmp_path), timeout_s=WAIT_S)
    consumer, model = plain(tmp_path)
    later = ranks.run(4, models.go_on, str(tmp_path), kind, timeout_s=WAIT_S)
    for answer in later:
        assert answer["loaded"] == answers[0]["print"]
        assert answer["unchanged"] == answer["again"] == 0
    version = consumer.poll()
    assert version is not None
    version.apply(model)
    assert models.fingerprint(model.state_dict()) == later[0]["print"]
    once_more = ranks.run(3, models.go_on, str(tmp_path), "fsdp", timeout_s=WAIT_S)
    assert once_more[0]["loaded"] == later[0]["print"]


@pytest.mark.slow
@pytest.mark.parametrize("before", ["upload", "commit"])
def test_a_rank_that_dies_leaves_nothing_to_be_seen_and_the_next_job_goes_on(
    tmp_path: Path, ranks: RankPool, before: str
) -> None:
    answers = ranks.run(4, models.die, str(tmp_path), before, lost=1, timeout_s=WAIT_S)
    assert [answer["error"] for answer in answers[:3]] == ["RetryError"] * 3
    consumer, model = plain(tmp_path)
    assert consumer.version == 1
    later = ranks.run(4, models.go_on, str(tmp_path), "fsdp", timeout_s=WAIT_S)
    version = consumer.poll()
    assert version is not None
    assert version.apply(model).version == 4
    assert models.fingerprint(model.state_dict()) == later[0]["print"]
    assert torch.equal(model.steps, torch.tensor(1))

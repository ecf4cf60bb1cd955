"""pull and follow on versions in parts: what whole versions have not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.test_following import FILE, holds
from tests.cli.tools import thinwire
from tests.integrations.chains import Parts
from tests.sync.checkpoints import State, nudged
from thinwire.sync.checkpoint import open_checkpoint


@pytest.fixture
def states() -> list[State]:
    generator = torch.Generator().manual_seed(0)
    first = {
        "a": torch.randn(100, 80, generator=generator).bfloat16(),
        "b": torch.randn(90, 100, generator=generator),
        "c": torch.randn(3, 8, 5, generator=generator).half(),
        "n": torch.tensor(3),
    }
    found = [first]
    for seed in range(1, 6):
        found.append(nudged(found[-1], seed))
    return found


def test_when_the_trainer_is_sharded_anew_the_anchor_is_fetched_once(states: list[State]) -> None:
    paths = []
    for k, size in enumerate((2, 2, 3, 3)):
        Parts("s", size, anchor_ratio=100).publish(states[k], step=k)
        paths.append(thinwire("follow", "s", "-o", "d", "--once", "--json").json["path"])
        assert holds(states[k])
    assert paths == ["anchor", "delta", "anchor", "delta"]


def test_tied_names_are_kept_as_in_other_files(states: list[State]) -> None:
    publisher = Parts("s", 2, anchor_ratio=100)
    for k in (0, 1):
        publisher.publish({**states[k], "again": states[k]["a"]})
        thinwire("pull", "s", "-o", "d")
        checkpoint = open_checkpoint(FILE)
        assert dict(checkpoint.aliases) == {"again": "a"}
        assert holds(states[k])
    assert thinwire("pull", "s", "-o", "d", "--json").json["path"] == "held"


def test_a_lost_map_of_chunks_is_no_path_and_changes_nothing(states: list[State]) -> None:
    Parts("s", 2).publish(states[0])
    thinwire("pull", "s", "-o", "d")
    Parts("s", 3).publish(states[1])
    [table] = Path("s/objects").glob("0000000002-*/chunks.json")
    table.rename("away")
    assert thinwire("pull", "s", "-o", "d", "--json", code=4).json["error"]["kind"] == "NoPathError"
    assert holds(states[0])
    Path("away").rename(table)
    assert thinwire("follow", "s", "-o", "d", "--once", "--json").json["version"] == 2
    assert holds(states[1])


def test_only_what_pinned_keys_have_signed_is_taken_and_what_was_seen_is_remembered(states: list[State]) -> None:
    thinwire("keygen", "p.key")
    publisher = Parts("s", 2, key="p.key")
    for k in (0, 1):
        publisher.publish(states[k])
        thinwire("pull", "s", "-o", "d", "--trust", "p.key.pub")
        assert holds(states[k])
    unsigned = Parts("other", 2)
    unsigned.publish(states[2])
    thinwire("pull", "other", "-o", "d", "--trust", "p.key.pub", code=3)
    assert holds(states[1])


def test_followers_share_a_cache(states: list[State]) -> None:
    publisher = Parts("s", 2, anchor_ratio=100)
    for k in (0, 1):
        publisher.publish(states[k])
        for folder in ("d", "e"):
            result = thinwire("follow", "s", "-o", folder, "--once", "--json", "--cache", "c", "--poll", "0.01")
            assert json.loads(result.out)["path"] == ("anchor", "delta")[k]
        assert Path("d/model.safetensors").read_bytes() == Path("e/model.safetensors").read_bytes()
        assert holds(states[k])

"""The command on a store of versions in parts: log, inspect, verify, gc, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.tools import thinwire
from tests.sharded.fleet import Trainer, moved
from tests.sharded.test_chunking import Spec
from thinwire.stores.local import LocalStore

SPEC: Spec = {"a": ((40, 30), "rows"), "n": ((7,), "replicated")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    trainer = Trainer(LocalStore(path, fsync=False), 2, SPEC, anchor_ratio=100, single_publisher=True)
    state = {"a": torch.randn(40, 30).bfloat16(), "n": torch.randn(7)}
    for step in range(3):
        trainer.publish(state, step=step)
        state = moved(state, step)
    return path


def test_log_and_inspect_tell_of_parts(folder: Path) -> None:
    rows = thinwire("log", folder, "--json").json["versions"]
    assert [row["parts"] for row in rows] == [2, 2, 2]
    assert [row["kind"] for row in rows] == ["delta", "delta", "anchor"]
    assert "in 2 parts" in thinwire("log", folder).out
    found = thinwire("inspect", folder, "--json").json
    assert (found["parts"], found["anchors"], found["missing"], found["problems"]) == (2, [1], [], [])
    assert found["delta_bytes"] > 0
    assert "sharded trainer" in thinwire("inspect", folder).out.replace("\n", " ")


def test_verify_looks_at_every_part(folder: Path) -> None:
    assert thinwire("verify", folder, "--json").json["ok"]
    assert thinwire("verify", folder, "--deep", "--json").json["replayed"] == 3
    tree = sorted((folder / "objects").glob("0000000002*/00001-tree.json"))[0]
    tree.write_bytes(tree.read_bytes().replace(b"BF16", b"BF61"))
    problems = thinwire("verify", folder, "--json", code=5).json["problems"]
    assert any("00001-tree.json" in problem["where"] for problem in problems)
    delta = sorted((folder / "objects").glob("0000000003*/00000-delta.safetensors"))[0]
    delta.unlink()
    problems = thinwire("verify", folder, "--deep", "--json", code=5).json["problems"]
    assert {problem["kind"] for problem in problems} >= {"ObjectNotFoundError"}
    assert any("0000000003.json" in problem["where"] for problem in problems)


def test_gc_keeps_what_the_newest_version_needs(folder: Path) -> None:
    thinwire("gc", folder, "--keep-last", "1", "--grace", "0s")
    assert thinwire("verify", folder, "--deep", "--json").json["ok"]


def test_what_is_for_whole_models_says_so(folder: Path) -> None:
    assert "ShardedConsumer" in thinwire("compact", folder, code=2).err.replace("\n", " ")

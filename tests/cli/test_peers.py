"""Followers that get versions from one another, and the rendezvous where they meet."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.cli.tools import thinwire
from thinwire import Publisher
from thinwire.peers.torrent import Swarm
from thinwire.stores.local import LocalStore

pytest.importorskip("libtorrent")


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(300_000, generator=torch.Generator().manual_seed(seed)).bfloat16()}


@pytest.fixture
def meeting() -> Iterator[str]:
    """A `thinwire rendezvous` in a process of its own."""
    command = [sys.executable, "-m", "thinwire", "rendezvous", "--host", "127.0.0.1", "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["rendezvous"][0]
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_follower_gets_versions_from_the_publisher() -> None:
    with Publisher("store", peers=Swarm(listen="127.0.0.1:0")) as publisher:
        report = publisher.publish(weights(0), step=0)
        anchor = next(
            info.key for info in LocalStore("store").list("objects/") if info.key.endswith("model.safetensors")
        )
        LocalStore("store").delete(anchor)  # so that only a peer has it
        found = thinwire("follow", "store", "-o", "model", "--once", "--json", "--peers", "swarm").json
        assert (found["version"], found["state"]) == (1, report.digest)


def test_a_publisher_that_is_gone_has_described_what_followers_seed(meeting: str) -> None:
    from safetensors.torch import save_file

    save_file(weights(1), "step-0.safetensors")
    peers = f"swarm://{meeting}"
    thinwire("publish", "store", "step-0.safetensors", "--peers", peers)
    assert any(info.key.endswith(".torrent") for info in LocalStore("store").list("objects/"))
    found = thinwire("follow", "store", "-o", "model", "--once", "--json", "--peers", peers).json
    assert found["version"] == 1
    thinwire("gc", "store", "--grace", "0")
    assert any(info.key.endswith(".torrent") for info in LocalStore("store").list("objects/"))
    thinwire("verify", "store", "--deep")


def test_misuse() -> None:
    from safetensors.torch import save_file

    save_file(weights(1), "step-0.safetensors")
    wrong = thinwire("publish", "store", "step-0.safetensors", "--peers", "swarm", code=2)
    assert "rendezvous" in wrong.err
    thinwire("follow", "store", "-o", "model", "--once", "--peers", "pigeons", code=2)
    thinwire("rendezvous", "--host", "no.such.host.invalid", code=2)
    assert "swarm://127.0.0.1" in thinwire("rendezvous", "--host", "127.0.0.1", "--port", "0", "--timeout", "0").out

"""pull and follow: the file is some published version at every moment, however the process ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tools import command, environment, series, thinwire
from tests.integrations.chains import CHAINS
from tests.sync.checkpoints import State, load, same, save, state
from thinwire.sync.checkpoint import open_checkpoint

FILE = Path("d/model.safetensors")


Publish = Callable[..., None]


@pytest.fixture(params=["whole", "of 2 ranks"])
def publish(request: pytest.FixtureRequest) -> Publish:
    """Publishes states, as whole versions or in parts."""

    def work(store: Path | str, states: list[State], **how: Any) -> None:
        publisher = CHAINS[request.param](str(store), **how)
        for step, tensors in enumerate(states):
            publisher.publish(tensors, step=step)

    return work


@pytest.fixture
def states(tmp_path: Path) -> list[State]:
    return series(tmp_path / "series", 6)[1]


def holds(tensors: State) -> bool:
    return same(load(FILE), tensors)


# --- pull ----------------------------------------------------------------------------------------------------------


def test_pull_fetches_only_what_is_missing(states: list[State], publish: Publish) -> None:
    publish("s", states[:4])
    first = thinwire("pull", "s", "-o", "d", "--version", 1, "--json").json
    assert (first["version"], first["path"], first["hops"], first["file"]) == (1, "anchor", 0, str(FILE))
    assert holds(states[0])
    second = thinwire("pull", "s", "-o", "d", "--json").json
    assert (second["version"], second["step"], second["path"], second["hops"]) == (4, 3, "delta", 3)
    assert 0 < second["bytes_fetched"] < first["bytes_fetched"] / 4
    assert holds(states[3])
    stamp = FILE.stat().st_mtime_ns
    third = thinwire("pull", "s", "-o", "d", "--json").json
    assert (third["path"], third["bytes_fetched"], FILE.stat().st_mtime_ns) == ("held", 0, stamp)
    metadata = open_checkpoint(FILE).files[0].header.metadata
    assert metadata == {"format": "pt", "thinwire.version": "4", "thinwire.state": third["state"]}
    back = thinwire("pull", "s", "-o", "d", "--version", 2, "--json").json
    assert (back["version"], back["path"]) == (2, "anchor+delta")
    assert holds(states[1])
    assert sorted(os.listdir("d")) == [".thinwire.lock", "model.safetensors"]


def test_versions_of_many_digits_fit_in_the_same_header(states: list[State], publish: Publish) -> None:
    publish("s", [states[k % 2] for k in range(12)])
    thinwire("pull", "s", "-o", "d", "--version", 9)
    size = FILE.stat().st_size
    assert thinwire("pull", "s", "-o", "d", "--json").json["path"] == "delta"
    assert FILE.stat().st_size == size
    assert open_checkpoint(FILE).files[0].header.metadata["thinwire.version"] == "12"
    assert holds(states[1])


def test_a_file_that_is_not_what_it_says_is_found_out(states: list[State], publish: Publish) -> None:
    publish("s", states[:3])
    for version in (2, 3):  # the newest one, and one that deltas would start from
        thinwire("pull", "s", "-o", "d", "--version", version)
        data = bytearray(FILE.read_bytes())
        data[-1] ^= 1
        FILE.write_bytes(data)
        result = thinwire("pull", "s", "-o", "d", "--json")
        assert (result.json["path"], "warning:" in result.err) == ("anchor+delta", True)
        assert holds(states[2])


def test_a_damaged_delta_is_gone_around(states: list[State], publish: Publish) -> None:
    publish("s", states[:3], anchor_every=2)
    thinwire("pull", "s", "-o", "d", "--version", 2)
    delta = next(Path("s").glob("objects/0000000003-*/*delta*"))
    delta.write_bytes(delta.read_bytes()[::-1])
    assert thinwire("pull", "s", "-o", "d", "--json").json["path"] == "anchor"
    assert holds(states[2])


def test_other_peoples_files_are_not_replaced(tmp_path: Path, states: list[State], publish: Publish) -> None:
    publish("s", states[:2])
    for make in (lambda: save(FILE, state()), lambda: FILE.write_bytes(b"notes")):
        make()
        before = FILE.read_bytes()
        for verb in (("pull",), ("follow", "--once")):
            assert "not replaced" in thinwire(verb[0], "s", "-o", "d", *verb[1:], code=2).err
        assert FILE.read_bytes() == before
    (tmp_path / "plain").write_text("x")
    thinwire("pull", "s", "-o", "plain", code=2)


def test_a_store_that_went_back_is_not_followed(states: list[State], publish: Publish) -> None:
    publish("s", states[:3])
    publish("restored", states[:2])
    thinwire("pull", "s", "-o", "d")
    for verb in (("pull",), ("follow", "--once")):
        assert "rollback" in thinwire(verb[0], "restored", "-o", "d", *verb[1:], code=3).err
    assert holds(states[2])
    assert thinwire("pull", "restored", "-o", "d", "--version", 2, "--json").json["version"] == 2  # told to, it does


def test_nothing_to_pull() -> None:
    Path("s/manifests").mkdir(parents=True)
    assert "no versions yet" in thinwire("pull", "s", "-o", "d", code=6).err
    assert "no such folder" in thinwire("pull", "elsewhere", "-o", "d", code=2).err
    assert "within 0.1 s" in thinwire("follow", "later", "-o", "d", "--timeout", "0.1", "--poll", "0.05", code=6).err


def test_a_version_that_was_never_published(states: list[State], publish: Publish) -> None:
    publish("s", states[:1])
    assert thinwire("pull", "s", "-o", "d", "--version", 9, "--json", code=4).json["error"]["facts"] == {"version": 9}


def test_shapes_may_change_between_versions(states: list[State], publish: Publish) -> None:
    changed = {**states[1], "k.weight": states[1]["k.weight"].reshape(-1).float(), "new": states[0]["a.weight"]}
    del changed["a.weight"]
    publish("s", [states[0], changed, {**changed, "new": states[1]["a.weight"]}])
    for version, expected in ((1, states[0]), (2, changed), (3, {**changed, "new": states[1]["a.weight"]})):
        thinwire("pull", "s", "-o", "d", "--version", version)
        assert holds(expected)


# --- follow --------------------------------------------------------------------------------------------------------


def test_follow_prints_a_line_a_version_and_runs_a_command(states: list[State], publish: Publish) -> None:
    publish("s", states[:2])
    hook = (
        'echo "$THINWIRE_VERSION $THINWIRE_STEP $THINWIRE_FILE" >> seen; echo chatter; exit $((THINWIRE_VERSION - 2))'
    )
    first = thinwire("follow", "s", "-o", "d", "--timeout", "0.2s", "--json", "--exec", hook)
    publish("s", states[2:4])
    second = thinwire("follow", "s", "-o", "d", "--once", "--json", "--exec", hook)
    lines = [json.loads(line) for line in (first.out + second.out).splitlines()]
    assert [(x["version"], x["path"], x["exec_status"]) for x in lines] == [(2, "anchor+delta", 0), (4, "delta", 2)]
    assert Path("seen").read_text().splitlines() == [f"{v} {s} {FILE.absolute()}" for v, s in ((2, 1), (4, 1))]
    assert "status 2" in second.err
    text = thinwire("follow", "s", "-o", "d", "--once")
    assert text.out.startswith("version 4 (step 1): already there, proved; ")


@pytest.mark.parametrize("publish", ["whole"], indirect=True)
def test_two_cannot_write_to_one_folder(states: list[State], publish: Publish) -> None:
    publish("s", states[:1])
    process = subprocess.Popen(command("follow", "s", "-o", "d"), stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("version 1")
        for verb in ("pull", "follow"):
            assert "at work in d" in thinwire(verb, "s", "-o", "d", code=2).err
    finally:
        process.kill()
        process.wait()
    assert thinwire("pull", "s", "-o", "d", "--json").json["path"] == "held"  # the lock died with the process


@pytest.mark.parametrize("publish", ["whole", pytest.param("of 2 ranks", marks=pytest.mark.slow)], indirect=True)
def test_a_version_that_cannot_be_had_is_waited_out(states: list[State], publish: Publish) -> None:
    publish("s", states[:2])
    thinwire("pull", "s", "-o", "d")
    publish("s", states[2:3])
    delta, anchor = (next(Path("s").glob(f"objects/{k}*")) for k in ("0000000003-*/*delta", "0000000001-*/*model"))
    for path in (delta, anchor):
        path.rename(f"{path.name}.away")
    result = thinwire("follow", "s", "-o", "d", "--timeout", "1s", "--poll", "0.1s", "--json", code=4)
    assert "trying again" in result.err
    assert result.json["error"]["kind"] == "NoPathError"
    assert holds(states[1])
    once = thinwire("follow", "s", "-o", "d", "--once", code=4)
    assert (once.out, "trying again" in once.err) == ("", False)
    args = command("follow", "s", "-o", "d", "--poll", "0.1s", "--timeout", "60s", "--json")
    with subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "trying again" in process.stderr.readline()
        Path(f"{delta.name}.away").rename(delta)  # mended
        assert json.loads(process.stdout.readline())["path"] == "delta"
        process.kill()
    assert holds(states[2])


@pytest.mark.parametrize("kind", ["whole", pytest.param("of 2 ranks", marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_leaves_a_version_and_goes_on(tmp_path: Path, kind: str) -> None:
    """kill -9 while versions keep coming; after each, the file is one of them, and at the end the newest."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = {
        f"w{k}": torch.randn(1000, 1000, generator=generator).bfloat16() for k in range(8)
    }  # 16 MB: writes take time
    publisher, versions, rng = CHAINS[kind](str(tmp_path / "s")), [], random.Random(1)

    def step() -> None:
        for tensor in weights.values():
            tensor[torch.rand(tensor.shape, generator=generator) < 0.01] *= 1.01
        publisher.publish(weights, step=len(versions))
        versions.append({name: tensor.clone() for name, tensor in weights.items()})

    step()
    thinwire("pull", "s", "-o", "d")
    killed_at = set()
    for _ in range(3):
        args = command("follow", "s", "-o", "d", "--poll", "0.01", "--json")
        with subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=environment()) as process:
            assert process.stdout is not None
            process.stdout.readline()  # it is at work
            step()
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
        at = int(open_checkpoint(FILE).files[0].header.metadata["thinwire.version"])
        assert holds(versions[at - 1])
        killed_at.add(len(versions) - at)
    Path("d/.model.safetensors.00ff00.tmp").write_bytes(b"half a file")  # what a kill in the middle leaves
    result = thinwire("follow", "s", "-o", "d", "--once", "--json").json
    assert (result["version"], result["path"] in ("delta", "held")) == (4, True)
    assert holds(versions[-1])
    assert sorted(os.listdir("d")) == [".thinwire.lock", "model.safetensors"]

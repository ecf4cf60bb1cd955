"""A real vLLM follows a chain of SmolLM2 while it serves: same tokens, and same bits in its fused tensors, as vLLM has
that loads each version afresh. ``make test-vllm``: in a virtual environment of its own, on a CPU."""

from __future__ import annotations

import importlib.util
import json
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


def run(*words: str, timeout_s: float = 900) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=timeout_s)
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
            print({key: found[key] for key in ("pause_s", "prepare_s", "elements", "bytes")})
    assert len({json.dumps(found["tokens"]) for found in versions}) == 4  # the versions do differ


def test_the_weight_transfer_backend_does_the_same(tmp_path: Path, fresh: dict[int, dict[str, Any]]) -> None:
    versions = run("backend", str(tmp_path))
    assert [found["version"] for found in versions] == [1, 2, 3, 4]
    for found in versions:
        assert found["params"] == fresh[found["version"]]["params"]
        assert found["tokens"] == fresh[found["version"]]["tokens"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_followed_while_requests_come_in(ranks: int, tmp_path: Path, fresh: dict[int, dict[str, Any]]) -> None:
    """Every answer is the one that a fresh vLLM gives with the version that it names. SmolLM2 has 9 heads: 3 ranks."""
    results = run("live", str(tmp_path), str(ranks))
    swaps = [found["swap"] for found in results if "swap" in found]
    answers = [found["answer"] for found in results if "answer" in found]
    print(swaps)
    assert [swap[0] for swap in swaps] == sorted({swap[0] for swap in swaps})
    assert (swaps[0][0], swaps[-1][0]) == (1, 4)
    seen = set()
    for answer in answers:
        (version,) = answer["versions"]
        seen.add(version)
        if ranks == 1:  # three add up in another order, and may round otherwise
            assert answer["tokens"] == fresh[int(version)]["tokens"][answer["prompt"]]
    assert {"1", "4"} <= seen

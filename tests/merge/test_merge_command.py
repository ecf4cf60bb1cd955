"""``thinwire merge``: what a person types, from patches, checkpoints and mergekit's YAML, to results and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.tools import thinwire
from tests.merge.states import random_state, tuned
from thinwire.cli.merge_config import config_of
from thinwire.errors import MisuseError
from thinwire.integrations.merging import merge, overlap, patch_between
from thinwire.integrations.patch_deltas import PatchReader, source_of_state
from thinwire.merge import figure

YAML = """base_model: base
merge_method: ties
models:
  - model: base
  - model: math.patch
    parameters: {weight: 0.6}
  - model: code.safetensors
    parameters:
      weight: 0.4
      density:
        - {filter: conv, value: 0.05}
        - {value: 1.0}
parameters: {normalize: true}
dtype: float32
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = random_state(0)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file(state, tmp_path / "base" / "model.safetensors")
    for name, seed in (("math", 1), ("code", 2)):
        save_file(tuned(state, seed), tmp_path / f"{name}.safetensors")
    thinwire(
        "merge", "from-checkpoint", tmp_path / "base", tmp_path / "math.safetensors", "-o", tmp_path / "math.patch"
    )
    thinwire("diff", tmp_path / "base", tmp_path / "code.safetensors", "-o", tmp_path / "code.patch")
    (tmp_path / "merge.yaml").write_text(YAML)
    return tmp_path


def test_a_configuration_leads_to_a_checkpoint_or_a_patch(folder: Path) -> None:
    found = thinwire("merge", "--config", folder / "merge.yaml", "-o", folder / "out", "--json").json
    assert (folder / "out" / "config.json").read_text() == "{}"
    base = random_state(0)
    density = [{"filter": "conv", "value": 0.05}, {"value": 1.0}]
    expected = merge(
        base,
        [patch_between(base, tuned(base, seed)) for seed in (1, 2)],
        method="ties",
        per_task=[{"weight": 0.6}, {"weight": 0.4, "density": density}],
    )
    merged = load_file(folder / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    patch = thinwire("merge", "-c", folder / "merge.yaml", "-o", folder / "out.patch", "--json").json
    assert patch["state"] == found["state"]
    applied = thinwire("apply", folder / "base", folder / "out.patch", "-o", folder / "applied", "--json").json
    assert applied["state"] == found["state"]


def test_overlap_shows_shares_and_conflicts(folder: Path) -> None:
    words = ["merge", "overlap", "--base", folder / "base", folder / "math.patch", folder / "code.patch"]
    rows = thinwire(*words, "--json").json["layers"]
    total = rows[-1]
    assert [row["layer"] for row in rows] == ["layer 0", "others", "all"]
    assert total["union"] == sum(row["union"] for row in rows[:-1])
    assert total["pairs"][0][1] == total["shared"][0] == total["shared"][1] > 0
    shown = thinwire(*words).out
    assert "sign" in shown
    assert "math alone" in " ".join(shown.split())
    thinwire(*words[:-1], code=2)
    thinwire(*words, "--figure", folder / "overlap.png")
    assert (folder / "overlap.png").read_bytes()[1:4] == b"PNG"
    refused = thinwire(*words, "--figure", folder / "overlap.docx", code=2)
    assert "docx" in refused.err


def test_the_figure_shows_the_shares_of_the_counts(tmp_path: Path) -> None:
    base = {name: torch.zeros(4) for name in ("embed", "h.0.up", "h.1.up")}
    moves = [[1.0, 1, 0, 0], [1.0, -1, 1, 0]]
    patches = [patch_between(base, {name: torch.tensor(move) for name in base}) for move in moves]
    found = list(overlap([PatchReader(patch, source_of_state(base)) for patch in patches]))
    rows, columns, several, clashes = figure._grids(found)
    assert (rows, columns) == (["outside layers", "layer 0", "layer 1"], ["outside", "up"])
    assert several.tolist() == pytest.approx(np.array([[2 / 3, np.nan], [np.nan, 2 / 3], [np.nan, 2 / 3]]), nan_ok=True)
    assert clashes[1, 1] == 0.5
    assert figure._jaccard([counts for _, _, counts in found])[0, 1] == pytest.approx(2 / 3)
    with pytest.raises(MisuseError, match="nothing to draw"):
        figure.overlap_figure([], [], tmp_path / "x.png")


WRONG = [
    ("merge_method: ties", "merge_method: tees", 2, "did you mean ties"),
    ("weight: 0.6", "wieght: 0.6", 2, "did you mean weight"),
    ("merge_method:", "merge_methods:", 2, "did you mean merge_method"),
    ("dtype: float32", "dtype: bfloat16", 2, "float32"),
    ("base_model: base\n", "", 2, "base_model"),
    ("math.patch", "missing.patch", 2, "missing.patch"),
    ("models:", "slices:", 2, "not supported"),
    ("value: 1.0", "value: .nan", 2, "give a number"),
    ("merge_method: ties", "merge_method: !!python/object/apply:os.getcwd []", 3, "no YAML"),
    ("parameters: {normalize: true}", "parameters: &a {x: 1}\nq: *a", 3, "anchors"),
    ("parameters: {normalize: true}", "parameters: " + "[" * 40 + "]" * 40, 3, "deeper"),
    (YAML, "- 1", 3, "no mapping"),
    (YAML, "a: [", 3, "no YAML"),
]


@pytest.mark.parametrize(("old", "new", "code", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_configurations_write_nothing(folder: Path, old: str, new: str, code: int, message: str) -> None:
    assert old in YAML
    (folder / "merge.yaml").write_text(YAML.replace(old, new, 1))
    result = thinwire("merge", "--config", folder / "merge.yaml", "-o", folder / "out", code=code)
    assert message in " ".join(result.err.split())
    assert not (folder / "out").exists()


def test_a_patch_of_another_base_names_both_digests(folder: Path) -> None:
    other = random_state(5)
    (folder / "math.patch").write_bytes(b"".join(patch_between(other, tuned(other, 1)).encode()))
    result = thinwire("merge", "--config", folder / "merge.yaml", "-o", folder / "out", "--json", code=4)
    assert result.err.count(patch_between(other, other).parent) == 1
    assert not (folder / "out").exists()


def test_what_mergekit_lists_and_we_cannot_do_is_said() -> None:
    plan = {"base_model": "b", "merge_method": "ties"}
    with pytest.raises(MisuseError, match="every tensor keeps"):
        config_of(
            {"base_model": "b", "merge_method": "ties", "models": [{"model": "m"}], "out_dtype": "float16"}, Path()
        )
    with pytest.raises(MisuseError, match="nothing to merge"):
        config_of(plan | {"models": [{"model": "b"}]}, Path())

"""``thinwire probe``: what it shows of two checkpoints is what a brute-force count finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.tools import thinwire

NAMES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (32, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.1.mlp.up_proj.weight": (32, 16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    old = {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in NAMES.items()}
    new = {}
    for name, tensor in old.items():
        moved = torch.rand(tensor.shape, generator=generator) < 0.1
        step = torch.randn(tensor.shape, generator=generator) * 0.01
        new[name] = torch.where(moved, (tensor.float() + step).bfloat16(), tensor)
    new["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(old | {"gone": torch.ones(1)}, tmp_path / "old.safetensors")
    save_file(new | {"come": torch.ones(1)}, tmp_path / "new.safetensors")
    return tmp_path


def changed_in(folder: Path, part: str) -> int:
    old, new = (load_file(folder / f"{name}.safetensors") for name in ("old", "new"))
    return sum(int((old[n].view(torch.int16) != new[n].view(torch.int16)).sum()) for n in NAMES if part in n)


def test_diff_counts_what_a_comparison_of_bits_counts(folder: Path) -> None:
    words = ["probe", "diff", folder / "old.safetensors", folder / "new.safetensors"]
    found = thinwire(*words, "--json").json
    assert found["total"]["changed"] == changed_in(folder, "") > 0
    assert found["kinds"]["mlp"]["changed"] == changed_in(folder, "mlp")
    assert found["kinds"]["attention"]["changed"] == changed_in(folder, "q_proj")
    assert found["layers"]["1"]["changed"] == changed_in(folder, "layers.1")
    assert found["layers"]["outside"]["changed"] == changed_in(folder, "embed")
    assert sum(found["total"]["ulps"]) == found["total"]["changed"]
    assert (found["added"], found["removed"], found["total"]["new_nan"]) == (["come"], ["gone"], 1)
    limited = thinwire(*words, "--threshold", "0.01", "--json").json["total"]["changed"]
    assert 0 < limited < found["total"]["changed"]
    shown = thinwire(*words, "--figure", folder / "d.png")
    assert "embedding" in shown.out
    assert "NaN" in shown.err
    assert (folder / "d.png").read_bytes()[1:4] == b"PNG"
    assert "layers.0.mlp.up_proj" in "".join(thinwire(*words, "--tensors").out.split())


def test_a_view_is_compared_as_it_would_be_served(tmp_path: Path) -> None:
    base = torch.ones(100)
    save_file({"w": base}, tmp_path / "a.safetensors")
    save_file({"w": base + 1e-6}, tmp_path / "b.safetensors")
    words = ["probe", "diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json"]
    assert thinwire(*words).json["total"]["changed"] == 100
    assert thinwire(*words, "--dtype", "bf16").json["total"]["changed"] == 0
    assert "bf16" in thinwire(*words, "--dtype", "int3", code=2).err


def test_rank_is_that_of_the_update(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, step = torch.zeros(30, 20), torch.randn(30, 1) @ torch.randn(1, 20)
    save_file({"w": base, "b": torch.zeros(3)}, tmp_path / "a.safetensors")
    save_file({"w": base + step, "b": torch.ones(3)}, tmp_path / "b.safetensors")
    rows = thinwire("probe", "rank", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json").json["tensors"]
    assert [(row["tensor"], row["full"]) for row in rows] == [("w", 20)]
    assert rows[0]["rank"] == pytest.approx(1, abs=1e-3)
    wrong = thinwire("probe", "rank", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--kind", "x", code=2)
    assert "entropy" in wrong.err


def test_null_is_what_a_step_of_adam_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = torch.nn.Parameter((torch.randn(200, 100) * 0.02).bfloat16())
    save_file({"mlp.up_proj.weight": weights.detach().clone()}, tmp_path / "a.safetensors")
    weights.grad = torch.randn(200, 100).bfloat16()
    torch.optim.Adam([weights], lr=1e-4).step()
    save_file({"mlp.up_proj.weight": weights.detach()}, tmp_path / "b.safetensors")
    words = ["probe", "null", tmp_path / "a.safetensors", "--lr", "1e-4", "--optimizer", "adam"]
    found = thinwire(*words, "--against", tmp_path / "b.safetensors", "--json").json["kinds"]["all"]
    assert found["observed"] > 0.5
    assert abs(found["excess"]) < 0.01
    assert "mlp" in thinwire(*words).out
    assert "gradient_rms" in thinwire(*words[:-1], "sgd", code=2).err


def test_spatial_tells_rows_from_anywhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = {f"layers.0.self_attn.{role}_proj.weight": torch.randn(32, 64) * 0.02 for role in "qv"}
    new = {name: tensor.clone() for name, tensor in old.items()}
    rows, anywhere = sorted(old)
    new[rows][3:5] += 1.0
    new[anywhere][torch.rand(32, 64) < 0.05] += 1.0
    save_file(old, tmp_path / "a.safetensors")
    save_file(new, tmp_path / "b.safetensors")
    words = ["probe", "spatial", tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    first, second = thinwire(*words, "--heads", "4", "--json").json["tensors"]
    assert first["tensor"] == rows
    assert first["rows"]["p"] <= 0.01
    assert first["rows"]["dispersion"] > 10
    assert second["rows"]["p"] > 0.01
    assert first["heads"]["p"] < 0.1
    shown = thinwire(*words, "--figure", tmp_path / "s.png").out
    assert "columns p" in shown
    assert (tmp_path / "s.png").read_bytes()[1:4] == b"PNG"
    assert "no matrix" in thinwire("probe", "spatial", words[2], words[2]).out


def test_ntk_is_the_product_of_gradients(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="Transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from thinwire.lab.models import tiny_llama

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", "a", "b", "c"])}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="?")
    for name, seed in (("one", 0), ("two", 1)):
        model = tiny_llama(4, hidden=64, layers=1, dtype=torch.float32, seed=seed)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "texts.tsv").write_text("a b\tc\nb\ta c\n\nc a b\n")
    words = ["probe", "ntk", tmp_path / "one", "--texts", tmp_path / "texts.tsv"]
    found = thinwire(*words, "--against", tmp_path / "two", "--figure", tmp_path / "k.png", "--json").json
    gradients = []
    model = tiny_llama(4, hidden=64, layers=1, dtype=torch.float32, seed=0)
    for tokens, first in (([1, 2, 3], 2), ([2, 1, 3], 1), ([0, 3, 1, 2], 1)):
        model.zero_grad()
        scores = model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        scores[torch.arange(len(tokens) - 1), tokens[1:]][first - 1 :].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    kernel = torch.stack(gradients) @ torch.stack(gradients).T
    one = found["models"][str(tmp_path / "one")]
    assert one["trace"] == pytest.approx(float(kernel.trace()), rel=1e-4)
    assert one["eigenvalues"] == pytest.approx(torch.linalg.eigvalsh(kernel).flip(0).tolist(), rel=1e-3)
    assert 0 < found["drift"] < 1
    assert (tmp_path / "k.png").read_bytes()[1:4] == b"PNG"
    (tmp_path / "texts.tsv").write_text("\n")
    assert "0 texts" in thinwire(*words, code=2).err
    (tmp_path / "texts.tsv").write_text("a b")
    assert "config.json" in thinwire("probe", "ntk", tmp_path, "--texts", tmp_path / "texts.tsv", code=2).err


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    found = thinwire("probe", "diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", code=2)
    assert "in common" in found.err

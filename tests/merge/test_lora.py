"""Adapters become patches that lead to what PEFT's own merge gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from tests.merge.test_libraries import ulps
from thinwire.errors import MalformedError, MisuseError, UnsupportedError
from thinwire.integrations.lora import open_adapter, patch_from_lora
from thinwire.sync.checkpoint import open_checkpoint
from thinwire.sync.rewrite import patch_checkpoint
from thinwire.wire.patch import Patch


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = torch.nn.Embedding(12, 24), torch.nn.Linear(24, 40), Conv1D(24, 40)
        self.head = torch.nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.down(self.up(self.embed(x)).relu()))
        return found


VARIANTS: list[dict[str, object]] = [
    {},
    {"use_rslora": True},
    {"alpha_pattern": {"up": 3}, "rank_pattern": {"head": 2}},
    {"target_modules": ["embed", "up"]},
    {"target_modules": ["down"], "fan_in_fan_out": True},
    {"use_dora": True},
    {"use_dora": True, "target_modules": ["embed"]},
    {"use_dora": True, "target_modules": ["down"], "fan_in_fan_out": True},
    {"modules_to_save": ["head"], "target_modules": ["up"]},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"lora_bias": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_adapter_leads_to_what_peft_merges(tmp_path: Path, options: dict[str, object], dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    net = Net().to(dtype)
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "head"]} | options
    model = peft.get_peft_model(net, peft.LoraConfig(**settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    model.save_pretrained(tmp_path / "adapter")
    patch = patch_from_lora(tmp_path / "base.safetensors", tmp_path / "adapter")
    assert patch.changed > 0
    patch_checkpoint(
        open_checkpoint(tmp_path / "base.safetensors"),
        [Patch.parse(b"".join(patch.encode()))],
        tmp_path / "out.safetensors",
    )
    merged = load_file(tmp_path / "out.safetensors")
    expected = model.merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        if "embed" in name and dtype == torch.bfloat16:  # here PEFT rounds the change to bf16 before it adds it
            torch.testing.assert_close(merged[name], tensor, rtol=2**-7, atol=2**-8)
        elif "weight" not in name and not options.get("lora_bias"):
            assert ulps(merged[name], tensor) == 0
        else:  # in float32, DoRA's norms are sums in another order
            assert ulps(merged[name], tensor) <= (8 if options.get("use_dora") and dtype == torch.float32 else 1)


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    with pytest.raises(MisuseError, match="adapter_config"):
        open_adapter(tmp_path)
    for text, error, message in [
        ("[1]", MalformedError, "no object"),
        ("{", MalformedError, "no JSON"),
        (json.dumps({"peft_type": "LORA", "trainable_token_indices": [1]}), UnsupportedError, "trainable_token"),
        (json.dumps({"peft_type": "IA3"}), UnsupportedError, "IA3"),
    ]:
        config.write_text(text)
        with pytest.raises(error, match=message):
            open_adapter(tmp_path)
    config.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8}))
    weights = {"base_model.model.up.lora_A.weight": torch.ones(2, 3)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(MalformedError, match="do not fit"):
        open_adapter(tmp_path)
    convolution = {"base_model.model.up.lora_A.weight": torch.ones(2, 3, 3)}
    save_file(convolution, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match="convolution"):
        open_adapter(tmp_path)
    fitting = weights | {"base_model.model.up.lora_B.weight": torch.ones(3, 2)}
    save_file(
        fitting | {"base_model.model.up.lora_magnitude_vector": torch.ones(9)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(MalformedError, match="magnitudes"):
        open_adapter(tmp_path)
    save_file(weights | {"base_model.model.up.lora_B.weight": torch.ones(3, 2)}, tmp_path / "adapter_model.safetensors")
    save_file({"up.weight": torch.ones(4, 3)}, tmp_path / "base.safetensors")
    with pytest.raises(MisuseError, match=r"up\.weight"):
        patch_from_lora(tmp_path / "base.safetensors", tmp_path)

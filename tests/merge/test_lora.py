"""Adapters become patches that lead to what PEFT's own merge gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.merge.test_libraries import ulps
from thinwire.errors import MalformedError, MisuseError, UnsupportedError
from thinwire.integrations.lora import open_adapter, patch_from_lora
from thinwire.sync.checkpoint import open_checkpoint
from thinwire.sync.rewrite import patch_checkpoint
from thinwire.wire.patch import Patch


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(24, 40), torch.nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(self.up(x).relu())
        return found


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"down": 3}}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_adapter_leads_to_what_peft_merges(tmp_path: Path, options: dict[str, object], dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    net = Net().to(dtype)
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    patch = patch_from_lora(tmp_path / "base.safetensors", tmp_path / "adapter")
    patch_checkpoint(
        open_checkpoint(tmp_path / "base.safetensors"),
        [Patch.parse(b"".join(patch.encode()))],
        tmp_path / "out.safetensors",
    )
    merged = load_file(tmp_path / "out.safetensors")
    expected = model.merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        assert ulps(merged[name], tensor) <= (0 if "bias" in name else 1)


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    with pytest.raises(MisuseError, match="adapter_config"):
        open_adapter(tmp_path)
    for text, error, message in [
        ("[1]", MalformedError, "no object"),
        ("{", MalformedError, "no JSON"),
        (json.dumps({"peft_type": "LORA", "use_dora": True}), UnsupportedError, "use_dora"),
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
    save_file(weights | {"base_model.model.up.lora_B.weight": torch.ones(3, 2)}, tmp_path / "adapter_model.safetensors")
    save_file({"up.weight": torch.ones(4, 3)}, tmp_path / "base.safetensors")
    with pytest.raises(MisuseError, match=r"up\.weight"):
        patch_from_lora(tmp_path / "base.safetensors", tmp_path)

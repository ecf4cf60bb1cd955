"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) as patches: what the base becomes once an adapter is merged in.

Read from PEFT's files, ``adapter_config.json`` and ``adapter_model.safetensors``, without PEFT. A layer's change is
``scale * B @ A``, computed in float32, added to the base in float32 and rounded once. Such a change is dense: its patch
costs more than the adapter, and methods that gain from sparsity gain less.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thinwire.errors import MalformedError, MisuseError, UnsupportedError
from thinwire.integrations.merging import MergedSource, patch_of_source
from thinwire.merge.delta import MERGEABLE, TensorDelta, delta_between
from thinwire.sync.checkpoint import Checkpoint, open_checkpoint, tensors_of
from thinwire.sync.encode import Options
from thinwire.sync.files import Stages
from thinwire.wire.patch import Patch

__all__ = ["Adapter", "open_adapter", "patch_from_lora"]

_CONFIG_BYTES_MAX = 1 << 20
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: matrices ``A`` [rank, in] and ``B`` [out, rank] and the scale, by the weight they change."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]
    transposed: bool

    def change(self, name: str) -> torch.Tensor:
        """The dense change of the weight ``name``, in float32."""
        a, b, scale = self.layers[name]
        found = (b.float() @ a.float()) * scale
        return found.T if self.transposed else found


def open_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT adapter's folder.

    Raises:
        MisuseError: a file is missing.
        MalformedError: the configuration is no JSON object, or matrices are missing or do not fit together.
        UnsupportedError: another kind of adapter, or a variant (DoRA, biases, saved modules).
    """
    where = Path(folder)
    config = _config(where / "adapter_config.json")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise UnsupportedError(f"{where}: adapters with {key} are not read; merge this one with PEFT, then diff")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise UnsupportedError(f"{where}: only LoRA without biases is read, not {str(config.get('peft_type'))[:40]}")
    found = tensors_of(open_checkpoint(where / "adapter_model.safetensors").map())
    layers: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    for name, a in found.items():
        module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        if not name.endswith(".lora_A.weight"):
            if not name.endswith(".lora_B.weight"):
                raise UnsupportedError(f"{where}: {name[:80]!r} is no LoRA matrix of a linear layer")
            continue
        b = found.get(name.replace(".lora_A.", ".lora_B."))
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise MalformedError(f"{where}: the matrices of {module[:80]!r} are missing or do not fit together")
        layers[module + ".weight"] = (a, b, _scale(config, module, a.shape[0]))
    if not layers:
        raise MalformedError(f"{where}: the adapter has no LoRA matrices")
    return Adapter(layers, bool(config.get("fan_in_fan_out")))


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MisuseError(f"there is no {path}; name the folder of a PEFT adapter", path=str(path))
    if path.stat().st_size > _CONFIG_BYTES_MAX:
        raise MalformedError(f"{path} is too large to be a configuration")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise MalformedError(f"{path} holds no object")
    return config


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    pattern = config.get("alpha_pattern") or {}
    if isinstance(pattern, dict):
        for key, value in pattern.items():  # PEFT: the end of the module's name
            if module == key or module.endswith("." + key):
                alpha = value
                break
            if re.search(r"[\\^$*+?()|\[\]]", str(key)):
                raise UnsupportedError("an adapter whose alpha_pattern has regular expressions is not read")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e6:
        raise MalformedError(f"lora_alpha is {str(alpha)[:40]!r}, not a number")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def patch_from_lora(
    base: Checkpoint | str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    options: Options | None = None,
    hash_name: str = "blake3",
    stages: Stages | None = None,
) -> Patch:
    """The patch from ``base`` to ``base`` with the adapter merged in, as PEFT's ``merge_and_unload`` would.

    Raises: as :func:`open_adapter`; and
        MisuseError: the adapter changes a tensor that the base has not, or has in another shape or without numbers.
    """
    source = (base if isinstance(base, Checkpoint) else open_checkpoint(base)).map()
    found = open_adapter(adapter)
    tensors = tensors_of(source)
    names = {source.aliases.get(name, name): name for name in found.layers}
    for name, own in names.items():
        layout = source.layouts.get(name)
        if layout is None or layout.dtype.name not in MERGEABLE or layout.shape != tuple(found.change(own).shape):
            raise MisuseError(f"the adapter does not fit the base: {own[:80]!r} is {layout}", tensor=own)

    def changes(name: str) -> TensorDelta | None:
        if name not in names:
            return None
        old = tensors[name]
        return delta_between(old, (old.float() + found.change(names[name])).to(old.dtype))

    return patch_of_source(source, MergedSource(source, changes), options or Options(), hash_name, stages)

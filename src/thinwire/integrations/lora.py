"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) as patches: what the base becomes once an adapter is merged in.

Read from PEFT's files, ``adapter_config.json`` and ``adapter_model.safetensors``, without PEFT. A layer's change is
``scale * B @ A``, computed in float32, added to the base in float32 and rounded once. DoRA (Liu et al. 2024,
arXiv:2402.09353) then scales each output's row to the length it has learnt. Such a change is dense: its patch costs
more than the adapter, and methods that gain from sparsity gain less.
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

__all__ = ["Adapter", "Layer", "open_adapter", "patch_from_lora"]

_CONFIG_BYTES_MAX = 1 << 20
_PREFIX = "base_model.model."
_UNSUPPORTED = ("trainable_token_indices", "target_parameters", "alora_invocation_tokens")


@dataclass(frozen=True, slots=True)
class Layer:
    """What an adapter does to one weight: matrices ``a`` [rank, in] and ``b`` [out, rank], a scale, and with DoRA the
    length ``magnitude`` [out] of each output's row. ``transposed``: the weight is stored as [in, out]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape."""
        out, width = self.b.shape[0], self.a.shape[1]
        return (width, out) if self.transposed else (out, width)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` with the adapter merged in, rounded once to its data type."""
        rows = (weight.T if self.transposed else weight).float() + (self.b.float() @ self.a.float()) * self.scale
        if self.magnitude is not None:
            rows = rows * (self.magnitude.float() / torch.linalg.norm(rows, dim=1))[:, None]
        return (rows.T if self.transposed else rows).to(weight.dtype).contiguous()


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: what it does to weights by their names, what it adds to biases, and the tensors (biases, saved
    modules) that it replaces as they are."""

    layers: Mapping[str, Layer]
    added: Mapping[str, torch.Tensor]
    replaced: Mapping[str, torch.Tensor]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that the base's tensors must have, by name."""
        whole = {name: tuple(t.shape) for name, t in (*self.added.items(), *self.replaced.items())}
        return {name: layer.shape for name, layer in self.layers.items()} | whole

    def merged(self, name: str, old: torch.Tensor) -> torch.Tensor:
        """What the base's tensor ``name`` becomes, in its data type."""
        if name in self.replaced:
            return self.replaced[name].to(old.dtype)
        if name in self.added:
            return (old.float() + self.added[name].float()).to(old.dtype)
        return self.layers[name].merged(old)


def open_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT adapter's folder: LoRA, rsLoRA or DoRA of linear layers and embeddings, with biases and modules that
    were trained whole.

    Raises:
        MisuseError: a file is missing.
        MalformedError: the configuration is no JSON object, or matrices are missing or do not fit together.
        UnsupportedError: another kind of adapter, or a variant (convolutions, single tokens).
    """
    where = Path(folder)
    config = _config(where / "adapter_config.json")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise UnsupportedError(f"{where}: adapters with {key} are not read; merge this one with PEFT, then diff")
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{where}: only LoRA is read, not {str(config.get('peft_type'))[:40]}")
    found = tensors_of(open_checkpoint(where / "adapter_model.safetensors").map())
    layers: dict[str, Layer] = {}
    added: dict[str, torch.Tensor] = {}
    for name in [name for name in found if name.endswith((".lora_A.weight", ".lora_embedding_A"))]:
        module, embeds = name.rpartition(".lora_")[0], name.endswith("_embedding_A")
        a, b = found.pop(name), found.pop(f"{module}.lora_embedding_B" if embeds else f"{module}.lora_B.weight", None)
        own = module.removeprefix(_PREFIX)
        if a.ndim > 2:
            raise UnsupportedError(f"{where}: {own[:80]!r} is a convolution; merge this adapter with PEFT, then diff")
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise MalformedError(f"{where}: the matrices of {own[:80]!r} are missing or do not fit together")
        magnitude = found.pop(f"{module}.lora_magnitude_vector", None)
        if magnitude is not None and magnitude.shape != b.shape[:1]:
            raise MalformedError(f"{where}: the magnitudes of {own[:80]!r} do not fit its matrices")
        scale = _scale(config, own, a.shape[0])
        layers[own + ".weight"] = Layer(a, b, scale, magnitude, embeds or bool(config.get("fan_in_fan_out")))
        bias = found.pop(f"{module}.lora_B.bias", None)
        if bias is not None:
            added[own + ".bias"] = bias.float() * scale
    for name in found:
        if ".lora_" in name or "token_adapter" in name:
            raise UnsupportedError(f"{where}: {name[:80]!r} is not read; merge this adapter with PEFT, then diff")
    if not layers:
        raise MalformedError(f"{where}: the adapter has no LoRA matrices")
    replaced = {name.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor for name, tensor in found.items()}
    return Adapter(layers, added, replaced)


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
    shapes = found.shapes()
    names = {source.aliases.get(name, name): name for name in shapes}
    for name, own in names.items():
        layout = source.layouts.get(name)
        if layout is None or layout.dtype.name not in MERGEABLE or layout.shape != shapes[own]:
            raise MisuseError(
                f"the adapter does not fit the base: {own[:80]!r} is {layout}, not {shapes[own]}", tensor=own
            )

    def changes(name: str) -> TensorDelta | None:
        return delta_between(tensors[name], found.merged(names[name], tensors[name])) if name in names else None

    return patch_of_source(source, MergedSource(source, changes), options or Options(), hash_name, stages)

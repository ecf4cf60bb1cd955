"""What a parameter is for, and in which layer it lies, from its name (and its module's type, where a model is at hand).

Known are the names of Llama, Qwen, Mistral, GPT-2, GPT-NeoX (Pythia), BERT, T5, ViT (Transformers' and timm's), ResNet
and whatever is called alike; what is not recognised is ``other``.

>>> place_of("model.layers.3.self_attn.q_proj.weight")
Place(kind='attention', role='q', layer=(3,))
>>> place_of("layer2.1.conv1.weight")
Place(kind='convolution', role='', layer=(2, 1))
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["KINDS", "Place", "place_of", "places_of"]

KINDS = ("embedding", "attention", "mlp", "norm", "convolution", "head", "bias", "other")
"""All kinds, in the order of a model."""

_LAYERS = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks)\.(\d+)(?:\.|$)|(?:^|\.)layer(\d+)\.(\d+)(?:\.|$)")
_NORM = re.compile(r"(norm|(?:^|[._])(?:ln|bn|layernorm|rms)(?:[._\d]|$)|downsample\.1|(?:^|\.)ln_\w+)", re.IGNORECASE)
_HEAD = re.compile(
    r"(?:^|\.)(lm_head|embed_out|classifier|score|cls|head|heads|fc|qa_outputs|output_projection|pre_classifier|v_head)"
    r"(?:\.|$)"
)
_EMBEDDING = re.compile(
    r"(embed|(?:^|\.)(?:wte|wpe|shared|tok_embeddings|relative_attention_bias)(?:\.|$)|cls_token|pos_emb|position_ids)"
)
_CONVOLUTION = re.compile(
    r"(?:^|\.)(conv\w*|downsample\.0|patch_embed\.proj|patch_embeddings\.projection|stem)(?:\.|$)"
)
_ATTENTION = re.compile(r"(attn|attention|qkv|query_key_value|(?:^|[._])[qkvo]_proj(?:\.|$))", re.IGNORECASE)
_MLP = re.compile(
    r"(mlp|ffn|feed_forward|experts|densereludense|intermediate\.dense|(?:^|\.)(?:gate|up|down)_proj"
    r"|(?:^|\.)fc\d(?:\.|$)|(?:^|\.)wi(?:_\d)?\.|(?:^|\.)w[123]\.|layer\.\d+\.output\.dense)",
    re.IGNORECASE,
)
_ROLES = (
    ("qkv", re.compile(r"(?:^|\.)(c_attn|qkv|qkv_proj|query_key_value|in_proj\w*|Wqkv)(?:\.|_|$)")),
    ("q", re.compile(r"(?:^|\.)(q_proj|query|q|wq|to_q)(?:\.|$)")),
    ("k", re.compile(r"(?:^|\.)(k_proj|key|k|wk|to_k)(?:\.|$)")),
    ("v", re.compile(r"(?:^|\.)(v_proj|value|v|wv|to_v)(?:\.|$)")),
    ("o", re.compile(r"(?:^|\.)(o_proj|out_proj|c_proj|o|wo|to_out|proj|dense|output\.dense)(?:\.|$)")),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter belongs: its ``kind``, one of :data:`KINDS`; of attention its ``role``, ``q``, ``k``, ``v``,
    ``qkv`` or ``o``, else empty; the numbers of its ``layer``, empty outside of layers, stage and block in a ResNet."""

    kind: str
    role: str = ""
    layer: tuple[int, ...] = ()


def _layer_of(name: str) -> tuple[int, ...]:
    found = _LAYERS.search(name)
    return () if found is None else tuple(int(number) for number in found.groups() if number is not None)


def _kind_of_module(module: nn.Module | None) -> str | None:
    if module is None:
        return None
    if type(module).__name__.lower().rstrip("123d").endswith("norm"):
        return "norm"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    return "embedding" if isinstance(module, nn.Embedding | nn.EmbeddingBag) else None


def _kind_of_name(name: str) -> str:
    in_layer = bool(_layer_of(name))
    if _NORM.search(name):
        return "norm"
    if _CONVOLUTION.search(name):
        return "convolution"
    if _HEAD.search(name) and not in_layer:
        return "head"
    if _EMBEDDING.search(name):
        return "embedding"
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(name) else "other"


def place_of(name: str, module: nn.Module | None = None) -> Place:
    """The place of the parameter called ``name``; ``module`` is the one that owns it, if known.

    A bias is of kind ``bias``, except that of a norm. T5's attention is in ``block.3.layer.0``: the block counts.
    """
    kind = _kind_of_module(module) or _kind_of_name(name)
    if kind != "norm" and re.search(r"(?:^|[._])bias$", name):
        kind = "bias"
    role = next((role for role, there in _ROLES if there.search(name)), "") if kind == "attention" else ""
    return Place(kind, role, _layer_of(name))


def places_of(named: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, Place]:
    """The places of all parameters of a module, or of the tensors of a state dict, by name."""
    if not isinstance(named, nn.Module):
        return {name: place_of(name) for name in named}
    modules = dict(named.named_modules(remove_duplicate=False))
    names = [name for name, _ in named.named_parameters(remove_duplicate=False)]
    return {name: place_of(name, modules.get(name.rpartition(".")[0])) for name in names}

"""Parameters of the models people train are told apart by name."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers

from thinwire.probe.kinds import KINDS, place_of, places_of

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **SMALL)),
    "qwen": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=11, head_dim=8, **SMALL)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False)
    ),
    "pythia": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=11, **SMALL)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=11, **SMALL)),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
}  # fmt: skip
EXPECTED = {
    "llama": {"embedding": 1, "attention": 8, "mlp": 6, "norm": 5, "head": 1},
    "qwen": {"embedding": 1, "attention": 8, "mlp": 6, "norm": 9, "head": 1},
    "gpt2": {"embedding": 2, "attention": 4, "mlp": 4, "norm": 10, "bias": 8, "head": 1},
    "pythia": {"embedding": 1, "attention": 4, "mlp": 4, "norm": 10, "bias": 8, "head": 1},
    "bert": {"embedding": 3, "attention": 8, "mlp": 4, "norm": 10, "head": 1, "other": 1, "bias": 14},
    "vit": {"embedding": 2, "convolution": 1, "attention": 8, "mlp": 4, "norm": 10, "bias": 14, "head": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_model_has_its_kind(name: str) -> None:
    model = MODELS[name]()
    by_name = {n: place_of(n) for n, _ in model.named_parameters()}
    by_module = places_of(model)
    if name in EXPECTED:
        assert Counter(p.kind for p in by_module.values()) == EXPECTED[name]
        assert by_name == by_module  # the names alone tell as much
    else:
        assert {p.kind for p in by_module.values()} == {"convolution", "norm", "head", "bias"}
    if name not in ("resnet",):
        assert {p.layer for p in by_module.values()} == {(), (0,), (1,)}
        assert {p.layer for p in by_module.values() if p.kind == "attention"} == {(0,), (1,)}


@pytest.mark.parametrize(
    ("name", "kind", "role", "layer"),
    [
        ("model.layers.12.self_attn.o_proj.weight", "attention", "o", (12,)),
        ("transformer.h.0.attn.c_attn.weight", "attention", "qkv", (0,)),
        ("transformer.h.0.attn.c_proj.weight", "attention", "o", (0,)),
        ("transformer.h.0.mlp.c_proj.weight", "mlp", "", (0,)),
        ("gpt_neox.layers.5.attention.query_key_value.weight", "attention", "qkv", (5,)),
        ("bert.encoder.layer.7.attention.self.key.weight", "attention", "k", (7,)),
        ("bert.encoder.layer.7.attention.output.dense.weight", "attention", "o", (7,)),
        ("encoder.block.3.layer.0.SelfAttention.v.weight", "attention", "v", (3,)),
        ("blocks.3.attn.qkv.weight", "attention", "qkv", (3,)),
        ("blocks.3.mlp.fc1.weight", "mlp", "", (3,)),
        ("patch_embed.proj.weight", "convolution", "", ()),
        ("pos_embed", "embedding", "", ()),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", "mlp", "", (0,)),
        ("model.layers.0.self_attn.q_proj.bias", "bias", "", (0,)),
        ("model.layers.0.input_layernorm.weight", "norm", "", (0,)),
        ("layer3.1.downsample.0.weight", "convolution", "", (3, 1)),
        ("layer3.1.downsample.1.weight", "norm", "", (3, 1)),
        ("layer3.1.bn2.bias", "norm", "", (3, 1)),
        ("fc.weight", "head", "", ()),
        ("base_model.model.model.layers.4.self_attn.q_proj.lora_A.default.weight", "attention", "q", (4,)),
        ("something", "other", "", ()),
        ("", "other", "", ()),
    ],
)
def test_names(name: str, kind: str, role: str, layer: tuple[int, ...]) -> None:
    place = place_of(name)
    assert (place.kind, place.role, place.layer) == (kind, role, layer)
    assert place.kind in KINDS


def test_a_module_knows_better_than_a_name() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Conv1d(3, 3, 1), torch.nn.Embedding(2, 3))
    assert [p.kind for p in places_of(model).values()] == ["norm", "norm", "convolution", "bias", "embedding"]
    assert places_of({"0.weight": torch.ones(1)})["0.weight"].kind == "other"

"""An inference engine's model in small: what vLLM's and SGLang's do with a checkpoint's tensors, by the same rules.

Their ``load_weights`` look up a table of stacked parameters (``q_proj`` is part ``q`` of ``qkv_proj``), and each
parameter has a ``weight_loader`` that narrows the tensor to this rank and copies it to its place. So does this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

STACKED = (
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
)
HIDDEN, HEADS, KV_HEADS, HEAD, MIDDLE, WORDS, EXPERTS = 12, 4, 2, 4, 10, 19, 3


def parameter(*shape: int, dtype: torch.dtype, loader: Callable[..., None]) -> nn.Parameter:
    made = nn.Parameter(torch.full(shape, 7.0).to(dtype), requires_grad=False)
    made.weight_loader = loader  # type: ignore[attr-defined]
    return made


class Engine(nn.Module):
    """Rank ``rank`` of ``ranks`` of a decoder with one dense and one mixture layer; the output is tied to the input."""

    def __init__(self, *, rank: int = 0, ranks: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        heads, kv, middle = HEADS // ranks, max(KV_HEADS // ranks, 1), MIDDLE // ranks
        self.sizes = {"q": heads * HEAD, "k": kv * HEAD, "v": kv * HEAD, 0: middle, 1: middle}
        padded = -(-WORDS // 8) * 8 // ranks
        made = {
            "embed_tokens.weight": parameter(padded, HIDDEN, dtype=dtype, loader=self.vocabulary),
            "layers.0.qkv_proj.weight": parameter(
                sum(self.sizes[k] for k in "qkv"), HIDDEN, dtype=dtype, loader=self.stacked
            ),
            "layers.0.qkv_proj.bias": parameter(sum(self.sizes[k] for k in "qkv"), dtype=dtype, loader=self.stacked),
            "layers.0.o_proj.weight": parameter(HIDDEN, heads * HEAD, dtype=dtype, loader=self.by_columns),
            "layers.0.gate_up_proj.weight": parameter(2 * middle, HIDDEN, dtype=dtype, loader=self.stacked),
            "layers.0.down_proj.weight": parameter(HIDDEN, middle, dtype=dtype, loader=self.by_columns),
            "layers.0.norm.weight": parameter(HIDDEN, dtype=dtype, loader=self.plain),
            "layers.1.experts.w13": parameter(EXPERTS, 2 * middle, HIDDEN, dtype=dtype, loader=self.expert),
            "layers.1.experts.w2": parameter(EXPERTS, HIDDEN, middle, dtype=dtype, loader=self.expert),
            "layers.1.router.weight": parameter(EXPERTS, HIDDEN, dtype=torch.float32, loader=self.plain),
            "scale": parameter(1, dtype=torch.float32, loader=self.plain),  # nothing of a checkpoint goes here
        }
        self.made = nn.ParameterDict({name.replace(".", "/"): tensor for name, tensor in made.items()})
        self.tensors: dict[str, Tensor] = {name: self.made[name.replace(".", "/")] for name in made}
        self.tensors["lm_head.weight"] = self.tensors["embed_tokens.weight"]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for full, tensor in weights:
            name = full.removeprefix("model.")
            if "rotary_emb.inv_freq" in name or name == "lm_head.weight":  # computed; tied
                continue
            if ".experts." in name:
                place, _, rest = name.rpartition(".experts.")
                number, kind, _ = rest.split(".")
                target = f"{place}.experts.{'w2' if kind == 'down_proj' else 'w13'}"
                self.expert(self.tensors[target], tensor, kind, int(number))
                continue
            for fused, part, shard in STACKED:
                if f".{part}." in name:
                    target = name.replace(part, fused)
                    self.stacked(self.tensors[target], tensor, shard)
                    break
            else:
                target = name
                self.tensors[name].weight_loader(self.tensors[name], tensor)  # type: ignore[attr-defined]
            loaded.add(target)
        return loaded

    def mine(self, tensor: Tensor, axis: int, size: int) -> Tensor:
        start = self.rank * size
        if start >= tensor.shape[axis]:  # fewer heads than ranks: several hold the same one
            start = self.rank * tensor.shape[axis] // self.ranks // size * size
        return tensor.narrow(axis, start, min(size, tensor.shape[axis] - start))

    def stacked(self, parameter: Tensor, tensor: Tensor, shard: object) -> None:
        before = {"q": [], "k": ["q"], "v": ["q", "k"], 0: [], 1: [0]}[shard]  # type: ignore[index]
        size, start = self.sizes[shard], sum(self.sizes[k] for k in before)  # type: ignore[index]
        parameter.data.narrow(0, start, size).copy_(self.mine(tensor, 0, size))

    def by_columns(self, parameter: Tensor, tensor: Tensor) -> None:
        parameter.data.copy_(self.mine(tensor, 1, parameter.shape[1]))

    def vocabulary(self, parameter: Tensor, tensor: Tensor) -> None:
        part = self.mine(tensor, 0, parameter.shape[0])
        parameter.data[: len(part)].copy_(part)
        parameter.data[len(part) :].fill_(0)  # the padding

    def plain(self, parameter: Tensor, tensor: Tensor) -> None:
        parameter.data.copy_(tensor)

    def expert(self, parameter: Tensor, tensor: Tensor, kind: str, number: int) -> None:
        if kind == "down_proj":
            parameter.data[number].copy_(self.mine(tensor, 1, parameter.shape[2]))
        else:
            half = parameter.shape[1] // 2
            parameter.data[number].narrow(0, 0 if kind == "gate_proj" else half, half).copy_(self.mine(tensor, 0, half))


def checkpoint(seed: int, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A checkpoint for it, with a tensor that no engine takes, and tied names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    words = random(WORDS, HIDDEN)
    found = {"model.embed_tokens.weight": words, "lm_head.weight": words}
    first = "model.layers.0."
    for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        found[f"{first}{name}_proj.weight"] = random(rows * HEAD, HIDDEN)
        found[f"{first}{name}_proj.bias"] = random(rows * HEAD)
    found[f"{first}o_proj.weight"] = random(HIDDEN, HEADS * HEAD)
    found[f"{first}rotary_emb.inv_freq"] = random(HEAD, kind=torch.float32)
    found[f"{first}norm.weight"] = random(HIDDEN)
    experts = [f"model.layers.1.experts.{k}." for k in range(EXPERTS)]
    for place in (first, *experts):
        found[f"{place}gate_proj.weight"] = random(MIDDLE, HIDDEN)
        found[f"{place}up_proj.weight"] = random(MIDDLE, HIDDEN)
        found[f"{place}down_proj.weight"] = random(HIDDEN, MIDDLE)
    found["model.layers.1.router.weight"] = random(EXPERTS, HIDDEN, kind=torch.float32)
    return found

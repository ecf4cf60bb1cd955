"""Checkpoints of every shape and kind, written by safetensors itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def state(seed: int = 0) -> State:
    """About 30,000 cells in eleven tensors: every width, packed and boolean ones, one empty, one without dimensions."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    return {
        "a.weight": noise(64, 64).to(torch.bfloat16),
        "b.weight": noise(100, 50),
        "c.half": noise(33, 7).half(),
        "d.fp8": noise(40, 40).to(torch.float8_e4m3fn),
        "e.fp8": noise(16).to(torch.float8_e5m2),
        "f.mask": noise(11, 3) > 0,
        "g.scale": torch.tensor(1.5 + seed),
        "h.empty": torch.zeros(0, 3),
        "i.ids": torch.randint(0, 99, (21,), generator=generator),
        "j.double": noise(5, 5).double(),
        "k.weight": noise(128, 128).to(torch.bfloat16),
    }


def nudged(old: State, seed: int = 1, share: float = 0.02) -> State:
    """The same tensors with some cells moved."""
    generator = torch.Generator().manual_seed(seed)
    new = {}
    for name, tensor in old.items():
        where = torch.rand(tensor.shape, generator=generator) < share
        if tensor.dtype == torch.bool:
            new[name] = tensor ^ where
        elif tensor.is_floating_point():
            new[name] = torch.where(where, tensor.float() * 1.01 + 1e-4, tensor.float()).to(tensor.dtype)
        else:
            new[name] = tensor + where
    return new


def lively(tensors: State, seed: int) -> State:
    """With a tensor so large, and moved as small learning rates do (small weights only), that context coding pays."""
    weights = torch.randn(400_000, generator=torch.Generator().manual_seed(99)) * 0.02
    moved = weights.bfloat16().float() + 3e-6 * torch.randn(400_000, generator=torch.Generator().manual_seed(seed))
    return {**tensors, "lively": moved.bfloat16()}


def save(path: Path, tensors: State, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata or {"format": "pt"})
    return path


def save_sharded(folder: Path, tensors: State, shards: int = 3) -> Path:
    """As ``save_pretrained`` lays it out, with a configuration, a tokenizer in a folder, and stale weights beside."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    where = {}
    for k in range(shards):
        name = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[k::shards]
        save(folder / name, {n: tensors[n] for n in mine})
        where.update(dict.fromkeys(mine, name))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    return folder


def load(path: Path) -> State:
    """With safetensors' own reader."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found: State = {}
    for file in files:
        found.update(load_file(file))
    return found


def same(a: State, b: State) -> bool:
    """Bit for bit, by name, dtype and shape."""

    def raw(t: torch.Tensor) -> bytes:
        return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""

    return sorted(a) == sorted(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and raw(a[n]) == raw(b[n]) for n in a
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

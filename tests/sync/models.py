"""Small models whose weights move as training moves them."""

from __future__ import annotations

import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def small_model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """About 10,000 weights; embedding and head are tied, and one tensor is empty, one has no dimension."""
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(50, 32), "a": torch.nn.Linear(32, 128), "b": torch.nn.Linear(128, 32)}
    )
    model["head"] = torch.nn.Linear(32, 50, bias=False)
    model["head"].weight = model["embed"].weight
    model.register_buffer("scale", torch.tensor(1.5))
    model.register_buffer("empty", torch.zeros(0, 3))
    return model.to(dtype)


def nudge(model: torch.nn.Module, seed: int, share: float = 0.02) -> None:
    """Move a share of the weights by about one unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            where = torch.rand(parameter.shape, generator=generator) < share
            parameter[where] *= 1.01


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    """Every tensor's bytes."""
    return {
        name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        for name, t in ((n, t.reshape(1) if t.dim() == 0 else t) for n, t in model.state_dict().items())
    }

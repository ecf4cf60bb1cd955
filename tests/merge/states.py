"""States and fine-tunes of them, as strategies."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from thinwire.integrations.patch_deltas import source_of_state
from thinwire.sync.encode import Options, make_patch, take_snapshot
from thinwire.sync.layout import StateSource
from thinwire.tensors.tree import state_of
from thinwire.wire.patch import Patch

State = dict[str, torch.Tensor]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def random_state(seed: int, dtype: torch.dtype = torch.bfloat16) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.bias": (7,), "a.weight": (40, 30), "b.0.conv": (4, 3, 5), "empty": (0,), "z": ()}
    return {name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in shapes.items()}


def tuned(base: State, seed: int, density: float = 0.2, scale: float = 0.1) -> State:
    """``base`` with about ``density`` of the values moved, each in its own way."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            found[name] = tensor.clone()
            continue
        step = torch.randn(tensor.shape, generator=generator) * scale
        mask = torch.rand(tensor.shape, generator=generator) < density
        found[name] = torch.where(mask, tensor.float() + step, tensor.float()).to(tensor.dtype)
    return found


def patch_between(base: State, new: State, *, level: str = "small", values: str = "ulp") -> Patch:
    snapshot = take_snapshot(StateSource(state_of(base)))
    return made(make_patch(snapshot, StateSource(state_of(new)), Options(level, values, 1)))


def made(patch: Patch) -> Patch:
    """As a reader of its file sees it."""
    return Patch.parse(b"".join(patch.encode()))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[State, State]:
    """A state and another with the same tensors, any share of the cells changed, odd values included."""
    base = random_state(draw(st.integers(0, 3)), draw(st.sampled_from(FLOATS)))
    new = tuned(base, draw(st.integers(0, 3)), draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])))
    if draw(st.booleans()):
        new["a.bias"][:3] = torch.tensor([float("nan"), -0.0, float("inf")])
        base["a.bias"][1] = 0.0
    if draw(st.booleans()):
        base["ids"], new["ids"] = torch.arange(5), torch.arange(5).flip(0)
    return base, new


__all__ = ["State", "made", "pairs", "patch_between", "random_state", "source_of_state", "tuned"]

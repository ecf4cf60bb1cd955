"""What the federated tests draw: models, updates, clients that come and go."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from thinwire.federated.model import ModelState

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8)


@st.composite
def states(draw) -> dict[str, torch.Tensor]:
    """State dicts of few elements: mixed data types, 0-d and empty tensors among them."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    shapes = draw(st.lists(st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0), (40,)]), min_size=1, max_size=5))
    state = {}
    for i, shape in enumerate(shapes):
        dtype = draw(st.sampled_from(DTYPES))
        state[f"t{i}"] = torch.randn(shape, generator=generator).mul(3).to(dtype)
    return state


def moved(state: ModelState, seed: int, scale: float = 0.1) -> ModelState:
    """The state with noise on its floats and one added to its counters."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in state.state_dict().items():
        if tensor.is_floating_point():
            changed[name] = tensor + (torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)
        else:
            changed[name] = ~tensor if tensor.dtype == torch.bool else tensor + 1
    return ModelState.of(changed)

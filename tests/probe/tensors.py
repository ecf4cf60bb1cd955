"""Pairs of tensors as strategies: any bits, or values that moved a little, of any data type that has numbers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from thinwire.tensors.bits import tensor_of
from thinwire.wire.spec import DTYPES

NUMBERS = [n for n in DTYPES if n not in ("F4", "F8_E8M0", "C64")]
FLOATS = ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"]


@st.composite
def pairs(draw: st.DrawFn, names: list[str] = NUMBERS) -> tuple[torch.Tensor, torch.Tensor]:
    name = draw(st.sampled_from(names))
    size = draw(st.sampled_from([0, 1, 2, 63, 64, 65, 130, 500]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    width = DTYPES[name].cell_bytes
    old = random.integers(0, 256, size * width).astype(np.uint8)
    if name == "BOOL":
        old &= 1
    old = old.view(f"u{width}")
    new = old.copy()
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    where = random.random(size) < share
    if draw(st.booleans()):
        new[where] = random.permutation(old)[where]
    else:
        reach = draw(st.sampled_from([1, 3, 300]))
        moved = (new.astype(np.int64) + random.integers(-reach, reach + 1, size)).astype(old.dtype)
        new[where] = (moved & 1 if name == "BOOL" else moved)[where]
    if size > 2 and draw(st.booleans()):
        old[0], new[0] = 0, 1 << (8 * width - 1) if name != "BOOL" else 1  # 0.0 to -0.0
    return tensor_of(old, name, (size,)), tensor_of(new, name, (size,))

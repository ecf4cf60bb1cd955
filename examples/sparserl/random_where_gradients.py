"""A method of SparseRL in one file: gradients say how many cells of each tensor are trained, chance says which ones.

Beside ``frozen-subnetwork`` it tells whether a choice by gradients loses by where it puts its cells (in which tensors),
or by which cells it takes there.

    thinwire bench sparserl --suite small --methods examples/sparserl/random_where_gradients.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thinwire.lab.sparserl.masked import masked, top_cells
from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting


def prepare(model: Any, setting: Setting) -> Prepared:
    generator = torch.Generator().manual_seed(setting.seed)

    def pick(scores: Sequence[torch.Tensor], density: float) -> list[torch.Tensor]:
        counts = [cells.numel() for cells in top_cells(scores, density)]
        drawn = [
            torch.randperm(score.numel(), generator=generator)[:n] for score, n in zip(scores, counts, strict=True)
        ]
        return [cells.sort().values for cells in drawn]

    return masked(model, setting, 0.01, pilot=4, pick=pick)


METHOD = Method(
    about="as many cells of each tensor as are among the 1 % with the largest gradients in 4 steps, at random, AdamW",
    prepare=prepare,
    lrs=(1e-3, 3e-3, 1e-2, 3e-2),
)

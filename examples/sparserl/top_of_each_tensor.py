"""A method of SparseRL in one file: of every tensor the 1 % of its cells with the largest gradients, found in 4 steps.

``frozen-subnetwork`` takes the largest of all tensors together. Here no tensor gets more than its share: gradients
choose within tensors, not among them.

    thinwire bench sparserl --suite small --methods examples/sparserl/top_of_each_tensor.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thinwire.lab.sparserl.masked import masked, top_cells
from thinwire.lab.sparserl.methods.base import Method, Prepared, Setting


def top_of_each(scores: Sequence[torch.Tensor], density: float) -> list[torch.Tensor]:
    """The same share of every tensor, the largest scores first."""
    return [top_cells([score], density)[0] for score in scores]


def prepare(model: Any, setting: Setting) -> Prepared:
    return masked(model, setting, 0.01, pilot=4, pick=top_of_each)


METHOD = Method(
    about="of every tensor the 1 % of its cells with the largest gradients in 4 steps that move nothing, kept, AdamW",
    prepare=prepare,
    lrs=(3e-4, 1e-3, 3e-3, 1e-2),
)

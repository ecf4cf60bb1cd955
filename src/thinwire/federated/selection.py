"""Which elements of an update travel: one top-k over all layers, or a budget for each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.compress.base import Layout, check_density
from thinwire.compress.budget import allocate, gradient_norm_share, sensitivity
from thinwire.errors import MisuseError
from thinwire.federated.model import ModelState
from thinwire.tensors.select import top_k

__all__ = ["LAYERS", "entries", "select"]

LAYERS = ("global", "energy", "sensitivity", "even")


def entries(density: float, numel: int) -> int:
    """How many of ``numel`` elements a density stands for: at least one, if there are any.

    >>> entries(0.01, 1234), entries(0.01, 10), entries(0.01, 0)
    (12, 1, 0)
    """
    check_density(density)
    return min(numel, max(1, round(density * numel)))


def _scores(layers: str, update: Tensor, weights: ModelState, layout: Layout) -> Sequence[float]:
    if layers == "energy":
        return gradient_norm_share(update, layout)
    if layers == "sensitivity":
        return sensitivity(_flat(weights), update, layout)
    return [float(numel) for numel in layout.numels]


def _flat(state: ModelState) -> Tensor:
    return torch.cat([torch.zeros(0), *(state.tensors[i].reshape(-1).float() for i in state.layout.updated)])


def select(update: Tensor, density: float, weights: ModelState, *, layers: str = "global") -> Tensor:
    """Positions int32 ``[k]``, increasing, of what to send of ``update`` (float32 ``[numel]``); zeros never are.

    ``layers``: ``"global"`` takes the largest of all; ``"energy"`` shares the total out by each tensor's squared norm,
    ``"sensitivity"`` by ``sum |weight * update|`` (the loss's first-order change), ``"even"`` by size.

    Raises:
        MisuseError: an unknown way, a density outside (0, 1], or an update that is not finite.

    >>> state = ModelState.of({"a": torch.zeros(4), "b": torch.zeros(4)})
    >>> update = torch.tensor([9.0, 8.0, 7.0, 6.0, 0.4, 0.3, 0.2, 0.0])
    >>> select(update, 0.25, state).tolist(), select(update, 0.25, state, layers="even").tolist()
    ([0, 1], [0, 4])
    """
    if layers not in LAYERS:
        raise MisuseError(f"layers={layers!r}; there are {', '.join(LAYERS)}", layers=layers)
    if not bool(update.isfinite().all()):
        raise MisuseError("an update holds NaN or infinity; lower the learning rate or clip the gradients")
    count = entries(density, update.numel())
    if layers == "global" or not count:
        positions = top_k(update, count).indices
    else:
        layout = Layout(tuple((n,) for n in weights.layout.numels))
        counts = allocate(count, _scores(layers, update, weights, layout), layout.numels)
        positions = top_k(update, list(counts), segments=list(layout.numels)).indices
    return positions[update[positions.long()] != 0]

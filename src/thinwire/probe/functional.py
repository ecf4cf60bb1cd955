"""A model as a function of its weights, in float32, without dropout: what derivatives are taken of.

>>> layer = torch.nn.Linear(2, 1, bias=False)
>>> doubled = {"weight": torch.tensor([[2.0, 4.0]])}
>>> StandIn(layer, doubled)(torch.ones(2)).tolist()
[6.0]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from thinwire.errors import MisuseError

__all__ = ["StandIn", "Weights", "differentiable", "trainable", "widened"]

Weights = dict[str, Tensor]


class StandIn:
    """Called as the model, but with these weights; attributes are the model's."""

    def __init__(self, model: torch.nn.Module, weights: Weights) -> None:
        self._model, self._weights = model, weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._model, self._weights, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[None]:
    """No dropout, no example that sees another through batch statistics, and attention with second derivatives.

    Also inside ``torch.no_grad``.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # the other kernels have first derivatives only
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def trainable(model: torch.nn.Module, names: Iterable[str] | None = None) -> Weights:
    """The model's weights to differentiate by, detached, in float32 or wider; tied ones under their first name.

    Raises:
        MisuseError: there is none, a name is unknown, or one is not of real floats.
    """
    known = {name: weight for name, weight in model.named_parameters() if weight.requires_grad or names is not None}
    chosen = list(known) if names is None else list(dict.fromkeys(names))
    missing = [name for name in chosen if name not in known]
    if missing or not chosen:
        what = f"it has no weight {missing[0]!r}" if missing else "none of its weights requires a gradient"
        raise MisuseError(f"the model cannot be differentiated by what was asked for: {what}")
    for name in chosen:
        if not known[name].is_floating_point():
            raise MisuseError(f"{name!r} is {known[name].dtype}, not of real floats", name=name)
    return {name: _wide(known[name].detach()) for name in chosen}


def widened(model: torch.nn.Module) -> Weights:
    """All float weights and buffers, detached, in float32 or wider: one matrix product takes one data type only."""
    everything = [*model.named_buffers(), *model.named_parameters()]
    return {name: _wide(tensor.detach()) for name, tensor in everything if tensor.is_floating_point()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

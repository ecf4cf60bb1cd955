"""What a method is: a model in, the same model prepared to be trained, with its optimiser and what has to be sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["BETAS", "Method", "Prepared", "Setting", "adamw", "prepared", "state_bytes"]

BETAS = (0.9, 0.95)
"""Of every AdamW in the benchmark; none has weight decay."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method is told of its run: learning rate, number of steps, seed; tokens of solved problems (``context``),
    with which virtual tokens may begin."""

    lr: float
    steps: int
    seed: int
    context: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is ready to be trained.

    ``model`` is called as a Transformers causal language model. ``trained`` are the parameters that have gradients, by
    name, fp32. ``optimiser`` steps them. ``sent`` are the tensors that a worker needs after a step (their bf16
    roundings are published). ``watch()`` gives those in which changes are set beside the null, a mask's cells alone,
    and the optimiser that updates them; None while they are not chosen. ``remake`` makes an optimiser as that one of
    parameter groups, for the null. ``settings`` are the method's own, as JSON can hold them; ``trainable`` says how
    many numbers are trained: a mask's cells, not its tensors'.
    """

    model: Any
    trained: Mapping[str, torch.Tensor]
    optimiser: torch.optim.Optimizer
    sent: Mapping[str, torch.Tensor]
    watch: Callable[[], tuple[Mapping[str, torch.Tensor], torch.optim.Optimizer] | None]
    remake: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    settings: Mapping[str, Any] = field(default_factory=dict)
    trainable: int = 0


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train few numbers.

    ``prepare(model, setting)`` may change ``model`` (fp32, on the CPU, its weights already rounded to bf16) and returns
    it prepared. ``lrs`` is the grid from which the learning rate is tuned, ``source`` the paper or the library.
    """

    about: str
    prepare: Callable[[Any, Setting], Prepared]
    lrs: Sequence[float]
    source: str = ""


def adamw(params: Any, lr: float) -> torch.optim.AdamW:
    """AdamW as all methods use it: betas 0.9 and 0.95, no decay."""
    return torch.optim.AdamW(params, lr=lr, betas=BETAS, weight_decay=0.0)


def prepared(
    model: Any,
    optimiser_of: Callable[[Any], torch.optim.Optimizer],
    *,
    settings: Mapping[str, Any] | None = None,
    density: float = 1.0,
) -> Prepared:
    """A model all of whose parameters that require gradients are stepped and sent; ``density`` of them at a time."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = optimiser_of(list(trained.values()))
    return Prepared(
        model, trained, optimiser, trained, lambda: (trained, optimiser), optimiser_of, dict(settings or {}),
        max(1, round(density * sum(p.numel() for p in trained.values()))),
    )  # fmt: skip


def state_bytes(optimiser: Any) -> int:
    """Bytes of all tensors in an optimiser's state; positions of active cells among them."""
    if hasattr(optimiser, "state_bytes"):
        return int(optimiser.state_bytes())
    tensors = (value for state in optimiser.state.values() for value in state.values())
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

"""Runs beside the real one whose gradients mean nothing: what they change too, learning does not explain.

>>> model = torch.nn.Linear(4, 4)
>>> control = RandomGradientControl(model, lambda params: torch.optim.SGD(params, lr=0.1), seed=0)
>>> model(torch.ones(1, 4)).sum().backward()
>>> control.step(model)  # as large a step, in a random direction, of a copy
>>> bool((control.model.weight == model.weight).any())
False
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.errors import MisuseError
from thinwire.probe.changes import plain_tensor

__all__ = ["RandomGradientControl", "shuffled_advantages"]


class RandomGradientControl:
    """A copy of a model that is trained by Gaussian gradients of the norms of the real ones, tensor by tensor.

    ``model`` is the copy, which a tracker of its own can follow; ``optimizer`` is its optimiser, made of the copy's
    parameters that require gradients, whose hyperparameters the caller may set (``lr`` in :meth:`step`).
    """

    def __init__(
        self, model: nn.Module, make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], *, seed: int = 0
    ) -> None:
        gradients = [p.grad for p in model.parameters()]
        for p in model.parameters():  # gradients are not copied
            p.grad = None
        try:
            self.model = copy.deepcopy(model)
        finally:
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad])
        self._seed, self._steps = seed, 0

    @torch.no_grad()
    def step(self, model: nn.Module, *, lr: float | None = None) -> None:
        """One step of the copy; ``model``'s gradients are read for their norms. Call it before they are cleared.

        A tensor without a gradient has none in the copy, either; one whose gradient is not finite has zeros.

        Raises:
            MisuseError: ``model`` has other parameters than the copy.
        """
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._steps)
        mine = dict(self.model.named_parameters())
        theirs = dict(model.named_parameters())
        if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
            raise MisuseError("the model has other parameters than the control's copy; make a new control")
        for name, p in mine.items():
            gradient = theirs[name].grad
            p.grad = None if gradient is None else _of_the_same_norm(gradient, p, generator)
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.optimizer.step()
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The copy, its optimiser, and how many steps it made."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another control of an equal model was."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._steps = int(state["steps"])


def _of_the_same_norm(gradient: Tensor, like: Tensor, generator: torch.Generator) -> Tensor:
    norm = float(torch.linalg.vector_norm(plain_tensor(gradient), dtype=torch.float32))
    noise = torch.randn(like.shape, generator=generator)
    drawn = float(noise.norm())
    scale = norm / drawn if drawn and norm < float("inf") else 0.0
    return (noise * scale).to(device=like.device, dtype=like.dtype)


def shuffled_advantages(
    advantages: Tensor, *, group: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The advantages [B] of a batch in random order: rewards that have nothing to do with the answers.

    ``group``: only within groups of so many answers to one prompt, which keeps each group's advantages.

    Raises:
        MisuseError: not 1-d, or not a multiple of ``group``.

    >>> shuffled_advantages(torch.tensor([1.0, 2.0, 3.0, 4.0]), group=1).tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    size = len(advantages) if advantages.dim() == 1 else 0
    part = size if group is None else group
    if advantages.dim() != 1 or (group is not None and group < 1) or (part and size % part):
        raise MisuseError(f"advantages of shape {tuple(advantages.shape)} do not make groups of {group}")
    if not size:
        return advantages.clone()
    keys = torch.rand(size // part, part, generator=generator)
    order = keys.argsort(dim=1) + part * torch.arange(size // part)[:, None]
    return advantages[order.flatten().to(advantages.device)]

"""AdamW for low-precision weights: the optimiser keeps fp32 master copies and the model holds them rounded.

This is how RL fine-tuning runs in practice, and why its updates are sparse: at a learning rate of 1e-6 most steps
move a master copy by less than half a unit in the last place of its bf16 weight, so that most weights that are
served do not change (Miahi and Belilovsky 2026, arXiv:2602.03839).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

__all__ = ["MasterAdamW", "Stepping"]


class Stepping(Protocol):
    """What takes a model's gradients: updates its weights, removes the gradients, and returns their norm."""

    def step(self) -> float: ...


class MasterAdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on fp32 copies of a model's weights.

    After every :meth:`step` each weight equals its master copy rounded to the weight's dtype. Gradients are read from
    the model's parameters in their own dtype, clipped to ``clip_norm`` over all of them, and removed.

    >>> layer = torch.nn.Linear(4, 4).to(torch.bfloat16)
    >>> optimiser = MasterAdamW(layer, lr=1e-3)
    >>> layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    >>> gradient_norm = optimiser.step()
    >>> all(torch.equal(w, m.to(w.dtype)) for (_, w), m in zip(layer.named_parameters(), optimiser.masters()))
    True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        clip_norm: float = 1.0,
    ) -> None:
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._masters = [weight.detach().to(torch.float32, copy=True) for weight in self._weights]
        self._adamw = torch.optim.AdamW(self._masters, lr=lr, betas=betas, weight_decay=weight_decay, foreach=True)
        self._clip_norm = clip_norm

    def masters(self) -> Iterator[torch.Tensor]:
        """The fp32 copies, in the order of ``model.parameters()``."""
        return iter(self._masters)

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """The torch optimiser that updates the masters."""
        return self._adamw

    def set_lr(self, lr: float) -> None:
        """Use ``lr`` from the next step on."""
        for group in self._adamw.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self) -> float:
        """Update masters and weights from the gradients; return the gradient's norm before clipping."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._masters, self._clip_norm)
        self._adamw.step()
        for weight, master in zip(self._weights, self._masters, strict=True):
            weight.copy_(master)
            master.grad = None
        return float(norm)

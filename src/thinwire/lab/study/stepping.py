"""One optimiser step in a study: precision of the weights, controls on the gradient, enforced sparsity.

Weights are fp32 ``masters`` that the optimiser updates and the model holds rounded to bf16; ``bf16``, which the
optimiser updates in place; or ``fp32``. A control replaces the gradient by noise of the same norm in each tensor.
Enforced sparsity lets the optimiser see the gradient of chosen weights only; its moments stay 0 elsewhere, and so do
the updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["OPTIMISERS", "Stepper", "optimiser_of"]

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr, betas=(0.9, 0.95)),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "adafactor": lambda params, lr: torch.optim.Adafactor(params, lr=lr),
}
"""Optimisers by name; each takes parameters and a learning rate."""


def optimiser_of(name: str, lr: float) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    """What makes the optimiser ``name`` for a list of tensors."""
    return lambda params: OPTIMISERS[name](params, lr=lr)


class Stepper:
    """Steps ``model``, whose parameters are fp32 and are rounded to bf16 here unless ``weights`` is ``fp32``.

    ``owned`` are the tensors that the optimiser updates, by parameter name. ``control``: ``random`` replaces gradients.
    With ``enforce`` only a share ``density`` of each tensor is trained: at ``random``, or where the first ``gradient``
    is largest.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        make: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
        *,
        weights: str = "masters",
        control: str = "none",
        enforce: str = "none",
        density: float = 1.0,
        clip_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        masters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        if weights != "fp32":
            model.to(torch.bfloat16)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._rounded = weights == "masters"
        self.owned: dict[str, torch.Tensor] = masters if self._rounded else dict(self.parameters)
        self.optimiser = make(list(self.owned.values()))
        self._control, self._enforce, self._density = control, enforce, density
        self._clip_norm = clip_norm
        self._generator = torch.Generator().manual_seed(seed)
        self._masks: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def step(self) -> float:
        """Update the weights from the parameters' gradients, remove these, and return their norm before clipping."""
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        if self._control == "random":
            gradients = {name: self._noise_like(gradient) for name, gradient in gradients.items()}
        for name, gradient in self._masked(gradients).items():
            self.owned[name].grad = gradient.to(self.owned[name].dtype)
        norm = torch.nn.utils.clip_grad_norm_(list(self.owned.values()), self._clip_norm)
        self.optimiser.step()
        for name, owned in self.owned.items():
            owned.grad = None
            if self._rounded:
                self.parameters[name].copy_(owned)
        return float(norm)

    def _noise_like(self, gradient: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(gradient.shape, generator=self._generator)
        scale = float(gradient.float().norm()) / max(float(noise.norm()), 1e-30)
        return noise.mul_(scale).to(gradient.dtype)

    def _masked(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._enforce == "none":
            return gradients
        if self._masks is None:
            self._masks = {name: self._chosen(gradient) for name, gradient in gradients.items()}
        return {name: gradient * self._masks[name] for name, gradient in gradients.items()}

    def _chosen(self, gradient: torch.Tensor) -> torch.Tensor:
        count = max(1, round(self._density * gradient.numel()))
        scores: Any = gradient.abs().float()
        if self._enforce == "random":
            scores = torch.rand(gradient.shape, generator=self._generator)
        mask = torch.zeros(gradient.numel(), dtype=torch.bool)
        mask[scores.flatten().topk(count).indices] = True
        return mask.view(gradient.shape)

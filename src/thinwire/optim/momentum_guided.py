"""Leave out tensors that an Adam-like optimiser is done with: those whose momentum is small against its own noise.

The signal of a tensor is ``|m| / |sqrt(v)|``, norms of Adam's bias-corrected moments: 1 where every gradient is the
same, ``sqrt((1 - beta1) / (1 + beta1))`` (0.23 for 0.9) for noise without direction. A frozen tensor is not stepped and
its moments rest; every ``probe_every`` steps its gradient is held against the size it had when it was frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from thinwire.errors import MalformedError, MisuseError

__all__ = ["MomentumGuided"]


class MomentumGuided(Optimizer):
    """Steps ``inner`` without the tensors whose momentum's signal is low.

    Args:
        inner: an optimiser with ``exp_avg``, ``exp_avg_sq`` and ``step`` in its state, such as AdamW. Groups and state
            are shared with it, so that schedulers work on either.
        freeze_below: signal under which a tensor is frozen, 0 (never) to 1.
        every: steps between decisions to freeze.
        probe_every: steps between looks at the gradients of what is frozen.
        jump: a frozen tensor wakes when its gradient's norm is more than so many times what it was, or not finite.

    A frozen tensor whose gradient jumps, and stays so, is stepped again within ``probe_every`` steps.

    Raises:
        MisuseError: an argument out of range.

    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = MomentumGuided(torch.optim.AdamW(model.parameters()), freeze_below=0.1, every=10)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.frozen_tensors()
    0
    """

    def __init__(
        self, inner: Optimizer, *, freeze_below: float, every: int = 50, probe_every: int = 10, jump: float = 2.0
    ) -> None:
        if not 0 <= freeze_below <= 1:
            raise MisuseError(f"freeze_below must be from 0 to 1, not {freeze_below}")
        if every < 1 or probe_every < 1 or not jump >= 1:
            raise MisuseError("every, probe_every and jump must be at least 1")
        self.inner, self.freeze_below, self.every, self.probe_every, self.jump = (
            inner, freeze_below, every, probe_every, jump
        )  # fmt: skip
        self._steps = 0
        self._frozen: dict[torch.Tensor, float] = {}  # the gradient's usual norm when it was frozen
        self._ready = False
        super().__init__(inner.param_groups, inner.defaults)
        self._ready = True
        self.param_groups, self.state = inner.param_groups, inner.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds it to the inner optimiser."""
        if self._ready:
            self.inner.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def frozen_tensors(self) -> int:
        """How many tensors are frozen."""
        return len(self._frozen)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimiser without what is frozen. Gradients stay where they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._steps += 1
        if self._steps % self.probe_every == 0:
            self._probe()
        hidden = [(p, p.grad) for p in self._frozen]
        try:
            for p, _ in hidden:
                p.grad = None
            self.inner.step()
        finally:
            for p, gradient in hidden:
                p.grad = gradient
        if self._steps % self.every == 0:
            self._freeze()
        return loss

    def _probe(self) -> None:
        for p, usual in list(self._frozen.items()):
            if p.grad is not None and not float(p.grad.float().norm()) <= self.jump * usual:
                del self._frozen[p]

    def _freeze(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if p in self._frozen or p.grad is None or "exp_avg" not in state or "exp_avg_sq" not in state:
                    continue
                age, (beta1, beta2) = float(state["step"]), group["betas"]
                first = float(state["exp_avg"].float().norm()) / (1 - beta1**age)
                usual = (float(state["exp_avg_sq"].double().sum()) / (1 - beta2**age)) ** 0.5
                # a gradient that has just risen is a reason to go on, whatever the averages say
                calm = float(p.grad.float().norm()) <= self.jump * usual
                if calm and first < self.freeze_below * usual:
                    self._frozen[p] = usual

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's, the steps, and what is frozen by its place among all parameters."""
        places = {p: i for i, p in enumerate(self._parameters())}
        frozen = {places[p]: usual for p, usual in self._frozen.items()}
        return {"inner": self.inner.state_dict(), "steps": self._steps, "frozen": frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            MalformedError: a state of something else; nothing was changed.
        """
        params = self._parameters()
        if not {"inner", "steps", "frozen"} <= set(state_dict) or not all(
            0 <= i < len(params) for i in state_dict["frozen"]
        ):
            raise MalformedError("this is no state of MomentumGuided over these parameters")
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self._steps = state_dict["steps"]
        self._frozen = {params[i]: usual for i, usual in state_dict["frozen"].items()}

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.inner.param_groups for p in group["params"]]

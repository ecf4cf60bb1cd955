"""Leave out what an Adam-like optimiser is done with: tensors, or rows, whose momentum is small against its own noise.

The signal of a tensor (or row) is ``|m| / |sqrt(v)|``, norms of Adam's bias-corrected moments: 1 where gradients are
the same, ``sqrt((1 - beta1) / (1 + beta1))`` (0.23 for 0.9) for noise without direction. A frozen tensor is not stepped
and its moments rest; every ``probe_every`` steps its gradient is held against the size it had when it was frozen.
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
        granularity: ``tensor``, or ``row``: each row of a tensor of two dimensions or more rests on its own. The inner
            optimiser then steps the whole tensor, and rows that rest are put back, with their moments: what is sent
            gets sparse, not what is computed, unless all rows rest. Its count of steps goes on for all.

    A frozen tensor (or row) whose gradient jumps, and stays so, is stepped again within ``probe_every`` steps.

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
        self, inner: Optimizer, *, freeze_below: float, every: int = 50, probe_every: int = 10, jump: float = 2.0,
        granularity: str = "tensor",
    ) -> None:  # fmt: skip
        if not 0 <= freeze_below <= 1:
            raise MisuseError(f"freeze_below must be from 0 to 1, not {freeze_below}")
        if every < 1 or probe_every < 1 or not jump >= 1:
            raise MisuseError("every, probe_every and jump must be at least 1")
        if granularity not in ("tensor", "row"):
            raise MisuseError(f"granularity must be tensor or row, not {granularity!r}")
        self.granularity = granularity
        self.inner, self.freeze_below, self.every, self.probe_every, self.jump = (
            inner, freeze_below, every, probe_every, jump
        )  # fmt: skip
        self._steps = 0
        self._frozen: dict[torch.Tensor, float] = {}  # the gradient's usual norm when it was frozen
        self._rows: dict[torch.Tensor, torch.Tensor] = {}  # the same of each row, float32; NaN: it does not rest
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
        """How many tensors are frozen, all rows of them."""
        return len(self._frozen) + sum(1 for usual in self._rows.values() if not bool(usual.isnan().any()))

    def frozen_rows(self) -> int:
        """How many rows rest, of tensors whose rows rest on their own."""
        return sum(int((~usual.isnan()).sum()) for usual in self._rows.values())

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
        whole = [p for p, usual in self._rows.items() if not bool(usual.isnan().any())]
        hidden = [(p, p.grad) for p in (*self._frozen, *whole)]
        kept = [row for p in self._rows if p.grad is not None for row in self._resting(p)]
        try:
            for p, _ in hidden:
                p.grad = None
            self.inner.step()
        finally:
            for p, gradient in hidden:
                p.grad = gradient
            for x, at, values in kept:
                x[at] = values
        if self._steps % self.every == 0:
            self._freeze()
        return loss

    def _resting(self, p: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The weights and state of ``p``, which rows of them rest, and what those are."""
        at = (~self._rows[p].isnan()).nonzero().flatten()
        parts = [p, *(x for x in self.state.get(p, {}).values() if torch.is_tensor(x) and x.shape == p.shape)]
        return [(x, at, x[at].clone()) for x in parts]

    def _by_row(self, p: torch.Tensor) -> bool:
        return self.granularity == "row" and p.dim() >= 2

    def _probe(self) -> None:
        for p, usual in self._rows.items():
            if p.grad is not None:
                usual[~(_row_norms(p.grad) <= self.jump * usual)] = float("nan")
        for p, norm in list(self._frozen.items()):
            if p.grad is not None and not float(p.grad.float().norm()) <= self.jump * norm:
                del self._frozen[p]

    def _freeze(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if p in self._frozen or p.grad is None or "exp_avg" not in state or "exp_avg_sq" not in state:
                    continue
                age, (beta1, beta2) = float(state["step"]), group["betas"]
                if self._by_row(p):
                    firsts = _row_norms(state["exp_avg"]) / (1 - beta1**age)
                    spreads = _row_norms(state["exp_avg_sq"].sqrt()) / (1 - beta2**age) ** 0.5
                    rests = (_row_norms(p.grad) <= self.jump * spreads) & (firsts < self.freeze_below * spreads)
                    old = self._rows.get(p, torch.full_like(spreads, float("nan")))
                    self._rows[p] = torch.where(old.isnan() & rests, spreads, old)
                    continue
                first_norm = float(state["exp_avg"].float().norm()) / (1 - beta1**age)
                usual_norm = (float(state["exp_avg_sq"].double().sum()) / (1 - beta2**age)) ** 0.5
                # a gradient that has just risen is a reason to go on, whatever the averages say
                calm = float(p.grad.float().norm()) <= self.jump * usual_norm
                if calm and first_norm < self.freeze_below * usual_norm:
                    self._frozen[p] = usual_norm

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's, the steps, and what is frozen by its place among all parameters."""
        places = {p: i for i, p in enumerate(self._parameters())}
        frozen = {places[p]: usual for p, usual in self._frozen.items()}
        rows = {places[p]: usual.clone() for p, usual in self._rows.items()}
        return {"inner": self.inner.state_dict(), "steps": self._steps, "frozen": frozen, "rows": rows}

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
        rows = state_dict.get("rows", {})
        if not all(0 <= i < len(params) and usual.shape == params[i].shape[:1] for i, usual in rows.items()):
            raise MalformedError("rows that rest do not fit these parameters")
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self._steps = state_dict["steps"]
        self._frozen = {params[i]: usual for i, usual in state_dict["frozen"].items()}
        self._rows = {params[i]: usual.to(params[i].device, torch.float32, copy=True) for i, usual in rows.items()}

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.inner.param_groups for p in group["params"]]


def _row_norms(x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(x.float().flatten(1), dim=1)
    return found

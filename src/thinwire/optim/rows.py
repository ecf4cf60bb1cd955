"""AdamW of the rows that have gradients, with moments of those alone: the optimiser for predictive backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from thinwire.errors import MisuseError, RefuseError

__all__ = ["RowAdamW"]


class RowAdamW(Optimizer):
    """AdamW where a weight's gradient is a sparse tensor of rows: those rows are stepped, and their moments kept.

    Rows that were in the last gradient, too, keep their moments; others start from zero and count their own steps;
    moments of rows that are gone are dropped. State takes 8 bytes an element of the active rows. A parameter with a
    dense gradient (a bias) is stepped as a whole. Moments are float32.

    Args:
        params, lr, betas, eps, weight_decay: as in AdamW; decay is of the rows that are stepped.

    Raises:
        MisuseError: an argument out of range, or a sparse gradient that is not made of rows.

    >>> weight = torch.nn.Parameter(torch.ones(3, 2))
    >>> weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2))
    >>> RowAdamW([weight], lr=0.5, weight_decay=0.0).step()
    >>> (weight < 0.6).tolist()
    [[False, False], [True, True], [False, False]]
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise MisuseError("lr, eps and weight_decay must not be negative, betas from 0 to below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure's loss, if there is one.

        Raises:
            RefuseError: a gradient is infinite or NaN; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    rows, values = _rows_of(p)
                    if not bool(values.isfinite().all()):
                        raise RefuseError("a gradient is infinite or NaN; nothing was changed. Skip this step")
                    work.append((group, p, rows, values))
        for group, p, rows, values in work:
            self._row_step(group, p, rows, values.float())
        return loss

    def _row_step(self, group: dict[str, Any], p: torch.Tensor, rows: torch.Tensor, g: torch.Tensor) -> None:
        state, (beta1, beta2) = self._moved(p, rows, g), group["betas"]
        state["age"] += 1
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        shape = (-1,) + (1,) * (g.dim() - 1)
        first = (1 - beta1 ** state["age"].double()).view(shape)
        second = (1 - beta2 ** state["age"].double()).sqrt().view(shape)
        below = (v.sqrt() / second.float()).add_(group["eps"])
        table = p.view(1) if p.dim() == 0 else p
        w = table.index_select(0, rows).float().mul_(1 - group["lr"] * group["weight_decay"])
        w -= (group["lr"] / first).float() * m / below
        table.index_copy_(0, rows, w.to(p.dtype))

    def _moved(self, p: torch.Tensor, rows: torch.Tensor, g: torch.Tensor) -> dict[str, Any]:
        """The state of ``rows``: what there was of them, and zeros."""
        old: dict[str, Any] = self.state[p]
        if old and torch.equal(old["rows"], rows):
            return old
        state = {
            "rows": rows.clone(), "age": torch.zeros_like(rows),
            "exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g),
        }  # fmt: skip
        if old and old["rows"].numel() and rows.numel():
            at = torch.searchsorted(old["rows"], rows).clamp(max=old["rows"].numel() - 1)
            stay = old["rows"][at] == rows
            for name in ("age", "exp_avg", "exp_avg_sq"):
                state[name][stay] = old[name][at[stay]]
        self.state[p] = state
        return state

    def state_bytes(self) -> int:
        """Bytes of all state tensors."""
        return sum(x.numel() * x.element_size() for state in self.state.values() for x in state.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, with the data types of the saved state."""
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        super().load_state_dict(state_dict)
        for p, i in zip(params, ids, strict=True):
            if i in state_dict["state"]:
                saved = state_dict["state"][i]
                self.state[p] = {name: x.detach().to(p.device, copy=True) for name, x in saved.items()}


def _rows_of(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Increasing rows int64 [r] and their gradients [r, ...]; all rows of a dense gradient."""
    gradient: Any = p.grad
    if gradient.layout == torch.strided:
        whole = gradient.view(1) if p.dim() == 0 else gradient
        return torch.arange(whole.shape[0], device=p.device), whole
    if gradient.layout != torch.sparse_coo or gradient.sparse_dim() != 1:
        raise MisuseError("RowAdamW takes dense gradients, and sparse ones of whole rows (sparse_dim 1)")
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()

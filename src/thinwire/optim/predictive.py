"""Backward passes that compute the weight gradients of a few rows only, chosen before.

Half of what backward costs in a linear layer is the gradient of its weight, ``grad_out.T @ x``. A row of it needs one
column of ``grad_out``. So, if the rows that will be stepped are known before backward, the others cost nothing:

    predictive = PredictiveBackward(model, rows=0.1, every=20)
    optimizer = RowAdamW(model.parameters())
    ... loss.backward(); optimizer.step(); predictive.update(); optimizer.zero_grad()

Which rows matter is predicted from what has been seen: the gradients of the active rows in each step, those of a few
others at random, and of all rows in a full backward pass every ``every`` steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch.nn.functional import linear

from thinwire.errors import MisuseError

__all__ = ["PredictiveBackward"]


@dataclass(eq=False)
class _Site:
    """One weight: the rows whose gradients are delivered, those that are looked at besides, what each was last seen
    to have (mean square), and what the backward passes of this step have shown."""

    weight: torch.nn.Parameter
    active: torch.Tensor
    watched: torch.Tensor  # active ones first
    scores: torch.Tensor
    seen: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class _RowsOfLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, site: _Site) -> Any:
        out = linear(x, weight, bias)
        ctx.site, ctx.watched, ctx.active = site, site.watched, site.active.numel()
        ctx.save_for_backward(x.to(out.dtype), weight)  # of autocast's type, as it would save it
        ctx.x_dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_out,) = grads
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x = (grad_out @ weight.to(grad_out.dtype)).to(ctx.x_dtype) if need_x else None
        flat = grad_out.reshape(-1, grad_out.shape[-1])
        grad_bias = flat.sum(0) if need_bias else None
        if not need_weight:
            return grad_x, None, grad_bias, None
        rows = flat.index_select(1, ctx.watched).T @ x.reshape(-1, x.shape[-1])
        ctx.site.seen[ctx.watched] += rows.float().square().mean(1)
        if ctx.active == 0:
            return grad_x, None, grad_bias, None
        delivered = rows[: ctx.active].to(weight.dtype)
        sparse = torch.sparse_coo_tensor(
            ctx.watched[None, : ctx.active], delivered, weight.shape, is_coalesced=True, check_invariants=False
        )
        return grad_x, sparse, grad_bias, None


def _forward(module: torch.nn.Linear, site: _Site, x: torch.Tensor) -> torch.Tensor:
    if not (torch.is_grad_enabled() and module.weight.requires_grad):
        return linear(x, module.weight, module.bias)
    if site.watched.numel() == 0:  # then torch does not even keep x
        return linear(x, module.weight.detach(), module.bias)
    found: torch.Tensor = _RowsOfLinear.apply(x, module.weight, module.bias, site)  # type: ignore[no-untyped-call]
    return found


class PredictiveBackward:
    """Makes the linear layers of a model compute weight gradients of few rows only, until :meth:`remove`.

    A weight's ``.grad`` becomes a sparse tensor of whole rows, as that of ``nn.Embedding(sparse=True)``, or stays None;
    :class:`thinwire.optim.RowAdamW`, ``torch.optim.SGD`` and ``SparseAdam`` take it. What forward computes, and the
    gradients of inputs and biases, are the same as without, bit for bit.

    Args:
        model: its ``nn.Linear`` layers (not of subclasses) whose weights require gradients are changed. A weight that
            another kind of module has, too, such as a tied embedding, stays dense. Linear layers may share one.
        rows: share of all rows that are active, above 0, at most 1.
        every: steps between full backward passes, after which the rows are chosen from what was seen of all.
        explore: share of all rows (or modules) that are looked at besides, at random, in each step, and not stepped.
        unit: ``row``, or ``module``: whole layers are active, so that of the others not even the input is kept.
        generator: of the exploration.

    The first step is a full pass that only looks: nothing is delivered. Rows are the same for all passes until
    :meth:`update`, so that gradients may be accumulated and activations recomputed (checkpointing).

    Raises:
        MisuseError: arguments out of range, no linear layer, or one whose ``forward`` has been replaced already.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 10), torch.nn.ReLU(), torch.nn.Linear(10, 10))
    >>> with PredictiveBackward(model, rows=0.1, every=10) as predictive:
    ...     for _ in range(2):
    ...         model.zero_grad()
    ...         model(torch.ones(1, 4)).sum().backward()
    ...         predictive.update()
    >>> sum(layer.weight.grad._nnz() for layer in (model[0], model[2]) if layer.weight.grad is not None)
    2
    """

    def __init__(
        self, model: torch.nn.Module, *, rows: float = 0.1, every: int = 20, explore: float = 0.01, unit: str = "row",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        if not 0 < rows <= 1 or not 0 <= explore <= 1:
            raise MisuseError("rows must be above 0 and at most 1, explore from 0 to 1")
        if every < 1 or unit not in ("row", "module"):
            raise MisuseError("every must be at least 1, unit row or module")
        self.rows, self.every, self.explore, self.unit, self.generator = rows, every, explore, unit, generator
        self._steps = 0
        self._layers = list(_layers(model))
        self._sites: dict[torch.nn.Parameter, _Site] = {}
        for layer in self._layers:
            if "forward" in vars(layer):
                raise MisuseError("the forward of a linear layer has been replaced already; remove that first")
        if not self._layers:
            raise MisuseError("there is no linear layer with a weight of its own that requires gradients")
        for layer in self._layers:
            weight = layer.weight
            assert isinstance(weight, torch.nn.Parameter)
            site = self._sites.get(weight) or self._site(weight)
            self._sites[weight] = site
            layer.forward = partial(_forward, layer, site)  # type: ignore[method-assign]

    @staticmethod
    def _site(weight: torch.nn.Parameter) -> _Site:
        count, device = weight.shape[0], weight.device
        everything, none = torch.arange(count, device=device), torch.empty(0, dtype=torch.long, device=device)
        zeros = torch.zeros(count, device=device)
        return _Site(weight, none, everything, zeros, zeros.clone())

    @property
    def full(self) -> bool:
        """Whether the pass at hand looks at all rows."""
        return self._steps % self.every == 0

    def active_rows(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Each weight's rows, int64 [r], increasing, whose gradients the next backward delivers."""
        return {site.weight: site.active.clone() for site in self._sites.values()}

    @torch.no_grad()
    def update(self) -> None:
        """Ends a step: takes in what was seen, and chooses for the next. After the optimiser's step."""
        for site in self._sites.values():
            watched = site.watched
            seen = site.seen[watched]
            site.scores[watched] = torch.where(seen.isfinite(), seen, site.scores[watched])
            site.seen.zero_()
        self._steps += 1
        self._choose()

    def _choose(self) -> None:
        sites = list(self._sites.values())
        total = sum(site.weight.shape[0] for site in sites)
        budget = max(1, round(self.rows * total))
        taken = self._best_rows(sites, budget) if self.unit == "row" else self._best_modules(sites, budget)
        for site, mask in zip(sites, taken, strict=True):
            site.active = mask.nonzero().flatten()
            others = (~mask).nonzero().flatten()
            if not self.full:
                draws = others.numel() if self.unit == "row" else 1  # a layer is looked at whole, or its input not kept
                wanted = (torch.rand(draws, generator=self.generator) < self.explore).expand(others.numel())
                others = others[wanted.to(others.device)]
            site.watched = torch.cat((site.active, others))

    @staticmethod
    def _best_rows(sites: list[_Site], budget: int) -> list[torch.Tensor]:
        scores = torch.cat([site.scores.cpu() for site in sites])
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[scores.sort(descending=True, stable=True).indices[:budget]] = True
        parts = torch.split(mask, [site.scores.numel() for site in sites])
        return [part.to(site.weight.device) for part, site in zip(parts, sites, strict=True)]

    @staticmethod
    def _best_modules(sites: list[_Site], budget: int) -> list[torch.Tensor]:
        """The best as long as they fit, one at least."""
        order = sorted(range(len(sites)), key=lambda i: -float(sites[i].scores.mean()))
        taken, left = set(order[:1]), budget - sites[order[0]].weight.shape[0]
        for i in order[1:]:
            if sites[i].weight.shape[0] <= left:
                taken.add(i)
                left -= sites[i].weight.shape[0]
        return [torch.full_like(site.scores, i in taken, dtype=torch.bool) for i, site in enumerate(sites)]

    def remove(self) -> None:
        """Gives the layers their own ``forward`` back; gradients are dense again. Twice is as good as once."""
        for layer in self._layers:
            vars(layer).pop("forward", None)
        self._layers = []

    def __enter__(self) -> PredictiveBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.remove()


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Linear]:
    """Linear layers whose weights are of linear layers only."""
    elsewhere = {id(p) for m in model.modules() if type(m) is not torch.nn.Linear for p in m.parameters(recurse=False)}
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.requires_grad and id(module.weight) not in elsewhere:
            yield module

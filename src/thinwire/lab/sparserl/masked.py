"""AdamW on a fixed set of cells: the optimiser holds these alone, and so do its moments.

>>> layer = torch.nn.Linear(8, 8, bias=False)
>>> before = layer.weight.detach().clone()
>>> optimiser = MaskedAdamW([layer.weight], [torch.tensor([3, 9])], lr=0.1)
>>> layer(torch.ones(1, 8)).sum().backward()
>>> optimiser.step()
>>> (layer.weight != before).flatten().nonzero().flatten().tolist(), optimiser.state_bytes()
([3, 9], 28)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from thinwire.errors import MisuseError
from thinwire.lab.sparserl.methods.base import Prepared, Setting, adamw

__all__ = ["MaskedAdamW", "Pick", "Subnetwork", "masked", "random_cells", "top_cells"]

Pick = Callable[[Sequence[torch.Tensor], float], list[torch.Tensor]]
"""From one score for each cell of some tensors, and a density, to sorted int64 flat positions by tensor."""


def random_cells(params: Sequence[torch.Tensor], density: float, seed: int) -> list[torch.Tensor]:
    """Cells drawn at random over all tensors together, ``density`` of them: sorted int64 flat positions by tensor.

    Raises:
        MisuseError: ``density`` is not above 0 and at most 1.
    """
    sizes = [p.numel() for p in params]
    count = _count(sizes, density)
    chosen = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))[:count]
    return _by_tensor(chosen, sizes)


def top_cells(scores: Sequence[torch.Tensor], density: float) -> list[torch.Tensor]:
    """Cells with the largest scores over all tensors together, as :func:`random_cells` returns them."""
    sizes = [s.numel() for s in scores]
    whole = torch.cat([s.detach().flatten().float() for s in scores])
    return _by_tensor(whole.topk(_count(sizes, density)).indices, sizes)


def _count(sizes: Sequence[int], density: float) -> int:
    if not 0 < density <= 1:
        raise MisuseError(f"density is {density}; give a share above 0, up to 1")
    return min(sum(sizes), max(1, round(density * sum(sizes))))


def _by_tensor(chosen: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    chosen, found, start = chosen.sort().values, [], 0
    for size in sizes:
        inside = chosen[(chosen >= start) & (chosen < start + size)]
        found.append(inside - start)
        start += size
    return found


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW on the cells ``cells[i]`` (flat positions) of ``params[i]``; every other cell keeps its bits.

    ``values`` are the trained numbers, fp32 [k] each: what the inner optimiser steps, and masters of 16-bit parameters.

    Raises:
        MisuseError: not one set of cells for each tensor, or a tensor with gaps in memory.
    """

    def __init__(self, params: Sequence[torch.Tensor], cells: Sequence[torch.Tensor], *, lr: float) -> None:
        if len(params) != len(cells):
            raise MisuseError(f"{len(params)} tensors and {len(cells)} sets of cells; give one for each")
        if not all(p.is_contiguous() for p in params):
            raise MisuseError("a parameter has gaps in memory; make it contiguous")
        super().__init__([{"params": list(params)}], {"lr": lr})
        self.tensors, self.cells = list(params), list(cells)
        self.values = [p.detach().view(-1)[c].float() for p, c in zip(self.tensors, self.cells, strict=True)]
        self.inner = adamw(self.values, lr)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the cells."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]  # schedulers change it here
        for p, cells, value in zip(self.tensors, self.cells, self.values, strict=True):
            value.grad = None if p.grad is None else p.grad.reshape(-1)[cells].float()
        self.inner.step()
        for p, cells, value in zip(self.tensors, self.cells, self.values, strict=True):
            p.detach().view(-1)[cells] = value.to(p.dtype)
            value.grad = None
        return loss

    def state_bytes(self) -> int:
        """Moments and counters of the cells, and their positions at 4 bytes each."""
        tensors = (t for state in self.inner.state.values() for t in state.values())
        return sum(int(t.numel() * t.element_size()) for t in tensors) + 4 * sum(c.numel() for c in self.cells)


class Subnetwork(MaskedAdamW):
    """Looks for ``pilot`` steps, which move nothing, and then trains the cells that ``pick`` takes by the sums of their
    squared gradients: the largest, unless another is given.

    ``chosen`` tells whether it has; before that, ``cells`` are those of ``stand_in``, as many.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        stand_in: Sequence[torch.Tensor],
        *,
        lr: float,
        pilot: int,
        pick: Pick = top_cells,
    ) -> None:
        if pilot < 1:
            raise MisuseError(f"pilot is {pilot}; give 1 step or more")
        super().__init__(params, stand_in, lr=lr)
        self._scores: list[torch.Tensor] | None = [torch.zeros_like(p) for p in self.tensors]
        self._left, self._pick = pilot, pick

    @property
    def chosen(self) -> bool:
        """Whether the pilot is over."""
        return self._scores is None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Look, or step the cells that were chosen."""
        if self._scores is None:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for score, p in zip(self._scores, self.tensors, strict=True):
            if p.grad is not None:
                score.add_(p.grad.square())
        self._left -= 1
        if not self._left:
            count = sum(c.numel() for c in self.cells)
            total = sum(p.numel() for p in self.tensors)
            self.cells = self._pick(self._scores, count / total)
            self.values = [p.detach().view(-1)[c].float() for p, c in zip(self.tensors, self.cells, strict=True)]
            self.inner = adamw(self.values, self.param_groups[0]["lr"])
            self._scores = None
        return loss


def masked(model: Any, setting: Setting, density: float, *, pilot: int = 0, pick: Pick = top_cells) -> Prepared:
    """``model`` prepared to be trained in ``density`` of its cells: random ones, or after ``pilot`` steps those that
    ``pick`` takes."""
    trained = dict(model.named_parameters())
    params = list(trained.values())
    cells = random_cells(params, density, setting.seed)
    if pilot:
        optimiser: MaskedAdamW = Subnetwork(params, cells, lr=setting.lr, pilot=pilot, pick=pick)
    else:
        optimiser = MaskedAdamW(params, cells, lr=setting.lr)

    def watch() -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer] | None:
        if isinstance(optimiser, Subnetwork) and not optimiser.chosen:
            return None
        return dict(zip(trained, optimiser.values, strict=True)), optimiser.inner

    return Prepared(
        model, trained, optimiser, trained, watch, lambda groups: adamw(groups, setting.lr),
        {"density": density, "pilot": pilot}, sum(c.numel() for c in cells),
    )  # fmt: skip

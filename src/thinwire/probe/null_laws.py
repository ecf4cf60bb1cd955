"""The updates that an optimiser makes of random gradients, by torch's own arithmetic.

After one step, Adam's update is ``lr`` times the sign of the gradient, whatever its size (as long as it is much larger
than ``eps``); after many steps of independent gradients it is ``lr`` times a number of standard deviation
``sqrt((1 - beta1) / (1 + beta1))``. Such facts know nothing of what is learnt. A :class:`Law` is a sample of them.

The arithmetic is that of torch.optim's loops on the CPU (``foreach`` there rounds beta2, too): moments and denominators
are rounded to the parameter's data type, and so is SGD's learning rate; the final multiply-add is done in float32 and
rounded once. ``fused`` ones keep float32 throughout. On bf16 parameters, Adam's first update is spread over about 1 %
to either side of ``lr``.

Sources: Adam (arXiv:1412.6980), AdamW (arXiv:1711.05101), Adafactor (arXiv:1804.04235, as torch does it).

>>> law = law_of(UpdateRule("adam", lr=1e-3), torch.float32)
>>> bool((abs(law.steps / 1e-3) - 1 < 1e-5).all()), law.steps.size
(True, 65536)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import sqrt
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.probe.gradients import Gradients, gradient_source

__all__ = ["LAW_STEPS_MAX", "OPTIMIZERS", "Law", "UpdateRule", "law_of"]

Floats = npt.NDArray[np.float64]
Name = Literal["adam", "adamw", "sgd", "adafactor"]

OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor")
LAW_STEPS_MAX = 4096
"""Steps after which a law is taken to be that of all later ones."""

_SIDE, _SIDE_LATER, _FEW = 256, 128, 64  # updates in a sample, as a matrix for Adafactor; fewer after many steps


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """An optimiser as the null sees it: what makes an update of a gradient. Names and defaults are torch.optim's.

    ``eps`` is Adam's; Adafactor's ``eps2`` is the least scale of a parameter, ``d`` the clipping threshold.
    """

    name: Name
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    fused: bool = False
    beta2_decay: float = -0.8
    eps2: float = 1e-3
    d: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise MisuseError(
                f"no closed form is known for {self.name!r}, only for {', '.join(OPTIMIZERS)}; use simulate_null"
            )
        if not 0 <= self.lr < float("inf"):
            raise MisuseError(f"lr={self.lr}; give a finite number of at least 0")

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> UpdateRule:
        """The rule of a parameter group of a torch optimiser, with the learning rate of now.

        Raises:
            MisuseError: no closed form is known for its class.
        """
        name = type(optimizer).__name__.lower()
        found: dict[str, Any] = {"name": name, "lr": float(group["lr"]), "fused": bool(group.get("fused"))}
        found["weight_decay"] = float(group.get("weight_decay", 0.0))
        if name in ("adam", "adamw"):
            found |= {"betas": tuple(float(b) for b in group["betas"]), "eps": float(group["eps"])}
        elif name == "sgd":
            found |= {k: group[k] for k in ("momentum", "dampening", "nesterov")}
        elif name == "adafactor":
            found |= {"beta2_decay": group["beta2_decay"], "eps2": group["eps"][1], "d": group["d"]}
        if name == "adam" and group.get("decoupled_weight_decay"):
            found["name"] = "adamw"
        return cls(**found)

    @property
    def decouples_decay(self) -> bool:
        """Whether weights are decayed by ``1 - lr * weight_decay`` before the update, rather than their gradients."""
        return self.name in ("adamw", "adafactor") and self.weight_decay != 0

    def scale(self, weights: Tensor, step: int) -> float:
        """What multiplies a law's steps for these weights: Adafactor's relative step size, else 1."""
        if self.name != "adafactor":
            return 1.0
        rms = float(weights.float().norm(2)) / sqrt(max(1, weights.numel()))
        return max(self.eps2, rms) * min(self.lr, 1 / sqrt(step))


@dataclass(frozen=True, slots=True)
class Law:
    """A sample of the updates of one step, float64 [n], sorted; ``sums`` [n + 1] are the sums of the first ones."""

    steps: Floats
    sums: Floats

    @classmethod
    def of(cls, steps: Floats) -> Law:
        """The law of a sample in any order."""
        ordered = np.sort(steps.astype(np.float64, copy=False).reshape(-1))
        return cls(ordered, np.concatenate([[0.0], np.cumsum(ordered)]))

    def scaled(self, factor: float) -> Law:
        """The law of ``factor``, at least 0, times the update."""
        return self if factor == 1 else Law(self.steps * factor, self.sums * factor)

    def outside(self, low: Floats, high: Floats, closed: npt.NDArray[np.bool_]) -> Floats:
        """The probability of an update below ``low`` or above ``high``; at them, too, where ``closed``."""
        steps = self.steps
        below = np.where(closed, np.searchsorted(steps, low, "right"), np.searchsorted(steps, low, "left"))
        upto = np.where(closed, np.searchsorted(steps, high, "left"), np.searchsorted(steps, high, "right"))
        found: Floats = (below + (steps.size - upto)) / steps.size
        return found

    def leaves(self, width: Floats, shift: Floats) -> Floats:
        """The probability that ``update + shift`` leads out of a cell of ``width`` from a place that is uniform in it:
        the mean of ``min(1, |update + shift| / width)``."""
        low, middle, high = (np.searchsorted(self.steps, edge) for edge in (-shift - width, -shift, -shift + width))
        inner = (self.sums[high] - self.sums[middle] + shift * (high - middle)) - (
            self.sums[middle] - self.sums[low] + shift * (middle - low)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(width > 0, inner / width, 0.0)
        found: Floats = (share + low + (self.steps.size - high)) / self.steps.size
        return found.clip(0.0, 1.0)


def _adam(gradients: Iterator[Tensor], rule: UpdateRule, dtype: torch.dtype) -> Tensor:
    beta1, beta2 = rule.betas
    state = torch.float32 if rule.fused and dtype != torch.float64 else dtype
    mean = square = torch.zeros(())
    step = 0
    for step, gradient in enumerate(gradients, 1):
        if step == 1:
            mean, square = torch.zeros_like(gradient, dtype=state), torch.zeros_like(gradient, dtype=state)
        gradient = gradient.to(state)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(rule.eps)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    update: Tensor = mean.to(work) * (-rule.lr / (1 - beta1**step)) / denominator.to(work)
    return update


def _sgd(gradients: Iterator[Tensor], rule: UpdateRule, dtype: torch.dtype) -> Tensor:
    used = buffer = torch.zeros(())
    for step, gradient in enumerate(gradients, 1):
        used = gradient
        if rule.momentum:
            fresh = step == 1
            buffer = gradient.clone() if fresh else buffer.mul_(rule.momentum).add_(gradient, alpha=1 - rule.dampening)
            used = gradient.add(buffer, alpha=rule.momentum) if rule.nesterov else buffer
    alpha = -rule.lr if rule.fused else float(torch.tensor(-rule.lr, dtype=dtype))
    return used.to(torch.float64 if dtype == torch.float64 else torch.float32) * alpha


def _adafactor(gradients: Iterator[Tensor], rule: UpdateRule, dtype: torch.dtype) -> Tensor:
    """For a step size of 1; :meth:`UpdateRule.scale` has the true one."""
    eps1 = torch.finfo(dtype).eps
    rows = columns = variance = last = torch.zeros(())
    for step, gradient in enumerate(gradients, 1):
        share, last = float(step) ** rule.beta2_decay, gradient
        if step == 1:
            rows, columns = gradient.new_zeros(gradient.shape[0], 1), gradient.new_zeros(1, gradient.shape[-1])
            variance = torch.zeros_like(gradient)
        if gradient.dim() > 1:
            rows.lerp_(torch.norm(gradient, dim=-1, keepdim=True).square_().div_(gradient.size(-1)), share)
            columns.lerp_(torch.norm(gradient, dim=-2, keepdim=True).square_().div_(gradient.size(-2)), share)
        else:
            variance.lerp_(gradient * gradient, share)
    if last.dim() > 1:
        estimate = (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=eps1))
    else:
        estimate = variance.clone()
    update = estimate.clamp_(min=eps1 * eps1).rsqrt_().mul_(last)
    clipped = max(1.0, update.norm(2).item() / (update.numel() ** 0.5 * rule.d))
    scaled: Tensor = update.to(torch.float64 if dtype == torch.float64 else torch.float32) * (-1 / clipped)
    return scaled


_UPDATES: dict[str, Callable[[Iterator[Tensor], UpdateRule, torch.dtype], Tensor]] = {
    "adam": _adam, "adamw": _adam, "sgd": _sgd, "adafactor": _adafactor,
}  # fmt: skip


def _sampled(
    rule: UpdateRule, dtype: torch.dtype, steps: int, gradients: Gradients, matrix: bool, seed: int, scale: Any
) -> Law:
    side = _SIDE if steps <= _FEW else _SIDE_LATER
    shape = (side, side) if matrix else (side * side,)
    sizes = _spread(scale, shape, seed) if scale is not None else torch.ones(())
    source = gradient_source(gradients, shape, seed=seed)
    drawn = ((next(source) * sizes).to(dtype) for _ in range(steps))
    return Law.of(_UPDATES[rule.name](drawn, rule, dtype).double().numpy())


_law = lru_cache(maxsize=64)(_sampled)


def _spread(scale: Sequence[Tensor], shape: tuple[int, ...], seed: int) -> Tensor:
    """The product of factors that broadcast to a tensor, at random rows and columns of it."""
    generator = torch.Generator().manual_seed(seed + 7)
    product = torch.ones(())
    full = tuple(max(sizes) for sizes in zip(*(factor.shape for factor in scale), strict=True))
    if len(full) != len(shape):
        raise MisuseError(f"the gradients' sizes broadcast to {tuple(full)}; a sample of them is {shape}")
    rows = [torch.randint(n, (m,), generator=generator) for n, m in zip(full, shape, strict=True)]
    for factor in scale:
        for axis, index in enumerate(rows):
            factor = factor.float().cpu().index_select(axis, index) if factor.shape[axis] > 1 else factor.float().cpu()
        product = product * factor
    return product


def law_of(
    rule: UpdateRule, dtype: torch.dtype, *, step: int = 1, gradients: Gradients | None = None, matrix: bool = False,
    scale: Sequence[Tensor] | None = None, seed: int = 0,
) -> Law:  # fmt: skip
    """The law of the updates of a step of a ``rule``, of parameters of a floating-point ``dtype``.

    ``gradients``: their distribution and scale; standard normal ones by default. ``matrix`` matters to Adafactor, which
    factors the second moments of matrices, and whose law is for a step size of 1. ``scale``: further factors of the
    gradients' size whose product broadcasts to a whole tensor, such as [rows, 1] and [1, columns].

    Raises:
        MisuseError: ``step`` is less than 1; factors of another number of dimensions than 2 (1 if not ``matrix``).
    """
    if step < 1:
        raise MisuseError(f"step={step}; the first step is 1")
    plain = replace(rule, weight_decay=0.0)
    if rule.name == "adafactor":
        plain = replace(plain, lr=1.0, eps2=0.0)
    draw = _law if scale is None else _sampled
    return draw(plain, dtype, min(step, LAW_STEPS_MAX), gradients or Gradients(), matrix, seed, scale)

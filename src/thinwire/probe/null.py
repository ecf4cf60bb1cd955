"""The precision null: the share of weights that would change if gradients were random.

A weight in a format of few bits changes only if its update is larger than about half a unit in its last place. Data
type, learning rate, optimiser and the sizes of the weights alone make most of the sparsity that is seen in RL updates:
the null says how much, and what is left, :class:`Excess`, is what training has to explain.

Three cases, all of the actual weights:

- **in place**: weights of few bits are updated in their own format. A weight changes if its update leads over the
  boundary to a neighbour (ties go to even; below a power of two the neighbour is half as far);
- **masters**: float32 masters are updated, and seen through a format of few bits. A view changes if the master leaves
  the interval that rounds to it: known where the masters are given, else a master is taken to lie anywhere in it;
- **full**: float32 in place, where nearly all weights change.

>>> generator = torch.Generator().manual_seed(0)
>>> weights = torch.randn(10_000, generator=generator).bfloat16() * 0.02
>>> in_place = predict_null(weights, lr=1e-6, optimizer="adam").fraction
>>> masters = predict_null(weights, lr=1e-6, optimizer="adam", masters=True).fraction
>>> full = predict_null(weights.float(), lr=1e-6, optimizer="adam").fraction
>>> f"{in_place:.3f} {masters:.3f} {full:.3f}"
'0.021 0.044 1.000'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from thinwire.errors import MisuseError
from thinwire.probe.changes import plain_tensor
from thinwire.probe.gradients import Gradients
from thinwire.probe.null_laws import Floats, Law, UpdateRule, law_of
from thinwire.tensors.bits import cells_of, dtype_of_tensor, tensor_of

__all__ = [
    "Excess",
    "NullPrediction",
    "change_probability",
    "excess_of",
    "float_bounds",
    "gradient_sizes",
    "predict_null",
]

Scale = float | tuple[Tensor, ...]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_DEFAULTS: dict[str, dict[str, Any]] = {"adamw": {"weight_decay": 0.01}}  # where torch's differ from UpdateRule's


@dataclass(frozen=True, slots=True)
class NullPrediction:
    """The expected share of elements that change in one step: of all (``fraction``) and by name (``tensors``).

    ``error``: the standard error of ``fraction`` that comes of looking at a sample of the weights; 0 where all were
    looked at. ``elements``: by name.
    """

    fraction: float
    error: float
    tensors: dict[str, float]
    elements: dict[str, int]


@dataclass(frozen=True, slots=True)
class Excess:
    """What was observed beyond the null: ``value = observed - null``, shares of elements, and an interval for it."""

    observed: float
    null: float
    low: float
    high: float

    @property
    def value(self) -> float:
        """Positive where more changed than random gradients would have changed."""
        return self.observed - self.null

    @property
    def significant(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return not self.low <= 0 <= self.high


def excess_of(observed: float, null: float, error: float, *, z: float = 1.96) -> Excess:
    """The excess of an observed share, all elements having been counted, over a null of a standard ``error``."""
    value = observed - null
    return Excess(observed, null, value - z * error, value + z * error)


@cache
def _narrow_bounds(name: str) -> tuple[Floats, Floats, Floats]:
    """Of each cell of bf16 or fp16: its value, and the boundaries below and above which numbers round to others."""
    cells = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    values = tensor_of(cells, name, (cells.size,)).double().numpy()
    magnitude = cells & 0x7FFF
    finite = np.flatnonzero((cells < 0x8000) & np.isfinite(values))
    sizes = values[finite]
    above = np.append(sizes[1:], 2 * sizes[-1] - sizes[-2])
    below = np.concatenate([[-sizes[1]], sizes[:-1]])
    inner, outer = np.full(1 << 15, np.nan), np.full(1 << 15, np.nan)
    inner[finite], outer[finite] = (below + sizes) / 2, (above + sizes) / 2
    negative = cells >= 0x8000
    low = np.where(negative, -outer[magnitude], inner[magnitude])
    high = np.where(negative, -inner[magnitude], outer[magnitude])
    return values, low, high


def float_bounds(tensor: Tensor) -> tuple[Floats, Floats, Floats, npt.NDArray[np.bool_]]:
    """Values of a flat tensor, the boundaries around each, and whether a number at a boundary rounds to a neighbour."""
    name = dtype_of_tensor(tensor).name
    cells = cells_of(tensor)
    odd = (cells & 1).astype(np.bool_)
    if name in ("BF16", "F16"):
        values, low, high = _narrow_bounds(name)
        return values[cells], low[cells], high[cells], odd
    numbers = cells.view(np.float32 if name == "F32" else np.float64)
    one = float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        up, down = np.nextafter(numbers, one).astype(np.float64), np.nextafter(numbers, -one).astype(np.float64)
        values = numbers.astype(np.float64)
        return values, (values + down) / 2, (values + up) / 2, odd


def _decayed(weights: Tensor, rule: UpdateRule) -> Floats:
    """What the update is added to, in float64: the weights after decoupled decay, rounded as torch rounds them."""
    if not rule.decouples_decay:
        return weights.double().numpy()
    factor = 1 - rule.lr * rule.weight_decay
    wide = weights.float() if rule.fused and weights.dtype != torch.float64 else weights
    return (wide * factor).double().numpy()


def _coupled(values: Floats, rule: UpdateRule) -> Floats:
    """The part of SGD's update that is decay, known without the gradient. Adam divides it away with the gradient."""
    if rule.name != "sgd" or not rule.weight_decay:
        return np.zeros_like(values)
    return values * (-rule.lr * rule.weight_decay)


def change_probability(
    weights: Tensor, law: Law, rule: UpdateRule, *, masters: Tensor | Literal["uniform"] | None = None
) -> Floats:
    """The probability, float64 [n], that each of the weights (any shape, a floating-point type) changes in a step.

    ``masters``: None updates the weights in place; a tensor [n] of wider numbers is what is updated, and ``weights`` is
    it, rounded; ``uniform`` knows only that there are such masters. Weights that are not finite never change.
    """
    flat = plain_tensor(weights).reshape(-1).cpu()
    values, low, high, odd = float_bounds(flat)
    if isinstance(masters, str):
        shift = _coupled(values, rule) - (rule.lr * rule.weight_decay * values if rule.decouples_decay else 0.0)
        found = law.leaves(high - low, np.where(np.isfinite(shift), shift, 0.0))
    else:
        updated = flat if masters is None else plain_tensor(masters).reshape(-1).cpu()
        start = _decayed(updated, rule)
        start = start + _coupled(start, rule)
        found = law.outside(low - start, high - start, odd)
    return np.where(np.isfinite(values) & ~np.isnan(low), found, 0.0)


def gradient_sizes(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """The magnitudes of all gradients in a module's ``.grad``, by name, as ``gradient_rms`` for :func:`predict_null`.

    With them the null's gradients are as large as the real ones, in the same rows and columns, but of random signs and
    at other places: what SGD and Adafactor need where more than a tenth of the weights change, since real gradients are
    no normal numbers.
    """
    return {name: (p.grad.detach().abs(),) for name, p in model.named_parameters() if p.grad is not None}


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1) if tensor.dim() < 2 else tensor.reshape(tensor.shape[0], -1)


def _named(weights: Any) -> dict[str, Tensor]:
    if isinstance(weights, Tensor):
        return {"": weights}
    if isinstance(weights, nn.Module):
        return {name: p for name, p in weights.named_parameters() if p.requires_grad}
    return dict(weights)


def _rule_for(tensor: Tensor, optimizer: Any, hyper: dict[str, Any]) -> tuple[UpdateRule, int]:
    """The rule for one tensor, and the number of steps that the optimiser has made on it."""
    if isinstance(optimizer, str):
        return UpdateRule(**{"name": optimizer, **_DEFAULTS.get(optimizer, {}), **hyper}), 0
    if hyper:
        raise MisuseError(f"{', '.join(hyper)}: the optimiser has its own")
    groups = [g for g in optimizer.param_groups if any(p is tensor for p in g["params"])]
    done = optimizer.state.get(tensor, {}).get("step", 0) if groups else 0
    return UpdateRule.of(optimizer, groups[0] if groups else optimizer.param_groups[0]), int(done)


def _histogram(flat: Tensor) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """The distinct numbers of a tensor of 16 bits, and how often each is there."""
    cells, counts = np.unique(cells_of(flat), return_counts=True)
    return tensor_of(cells, dtype_of_tensor(flat).name, (cells.size,)), counts.astype(np.int64)


def _fraction_of(
    tensor: Tensor, masters: Tensor | Literal["uniform"] | None, law: Law, rule: UpdateRule, most: int, seed: int
) -> tuple[float, float]:
    """The mean probability of a tensor's elements and the variance of that mean."""
    flat = plain_tensor(tensor).reshape(-1)
    if flat.dtype.itemsize == 2 and not isinstance(masters, Tensor):
        distinct, counts = _histogram(flat)
        return float(np.average(change_probability(distinct, law, rule, masters=masters), weights=counts)), 0.0
    if flat.numel() > most:
        chosen = torch.randint(flat.numel(), (most,), generator=torch.Generator().manual_seed(seed)).to(flat.device)
        flat = flat[chosen]
        masters = plain_tensor(masters).reshape(-1)[chosen] if isinstance(masters, Tensor) else masters
    found = change_probability(flat, law, rule, masters=masters)
    exact = flat.numel() == tensor.numel()
    return float(found.mean()), 0.0 if exact else float(found.var() / flat.numel())


def predict_null(
    weights: Tensor | Mapping[str, Tensor] | nn.Module,
    *,
    optimizer: str | torch.optim.Optimizer = "adam",
    view: torch.dtype | None = None,
    masters: bool | Mapping[str, Tensor] = False,
    step: int | None = None,
    gradient_rms: Scale | Mapping[str, Scale] | None = None,
    gradients: Gradients = Gradients(),  # noqa: B008
    sample: int = 1 << 18,
    seed: int = 0,
    **hyper: Any,
) -> NullPrediction:
    """The share of ``weights`` that changes in one step of an optimiser on random gradients; no gradient is looked at.

    Args:
        weights: a tensor, tensors by name, or a module (its parameters that require gradients); floating-point.
        optimizer: ``adam``, ``adamw``, ``sgd`` or ``adafactor`` with ``lr=`` and torch's further parameters (``betas``,
            ``eps``, ``weight_decay``, ``momentum``, ...), or a torch optimiser of such a class, which has them.
        view: the data type as which float32 ``weights`` are seen; they are the masters then.
        masters: ``weights`` are views of float32 masters: given by name, or True where they are not known.
        step: the step to predict; by default the next one of a torch optimiser, else the first. Later steps take the
            gradients to be independent (but for ``gradients.correlation``) and the weights to be those given.
        gradient_rms: root mean square of the gradients, for all or by name: a number, or the magnitudes of real ones
            (:func:`gradient_sizes`), of which only signs and places are then random. SGD needs it; to Adafactor it
            matters where that clips: a little, and in bf16; to Adam where gradients are 0, as of rare tokens.
        gradients: their distribution.
        sample: the most elements looked at one by one in a tensor; weights of 16 bits are counted instead, all of them.

    Raises:
        MisuseError: SGD without ``gradient_rms``; weights that are no floats; masters that do not fit; an optimiser
            without a closed form (:func:`thinwire.probe.null_simulation.simulate_null` takes any).
    """
    tensors: dict[str, float] = {}
    elements: dict[str, int] = {}
    variance = 0.0
    for name, tensor in _named(weights).items():
        master = masters.get(name) if isinstance(masters, Mapping) else None
        rule, done = _rule_for(tensor if master is None else master, optimizer, hyper)
        plain = plain_tensor(tensor)
        if plain.dtype not in _FLOATS:
            raise MisuseError(f"{name or 'it'} is {plain.dtype}; the null is for bf16, fp16, fp32 and fp64 weights")
        elements[name] = plain.numel()
        if not plain.numel():
            tensors[name] = 0.0
            continue
        updated, seen = _updated_and_seen(name, plain, view, masters)
        rms = gradient_rms.get(name) if isinstance(gradient_rms, Mapping) else gradient_rms
        if rule.name == "sgd" and rms is None:
            raise MisuseError("SGD's updates are as large as its gradients; give gradient_rms", name=name)
        spread = tuple(_as_matrix(plain_tensor(f)) for f in rms) if isinstance(rms, tuple) else None
        drawn = replace(gradients, distribution="sign") if spread else gradients
        number = done + 1 if step is None else step
        law = law_of(
            rule, _work_dtype(updated, plain), step=number, matrix=plain.dim() > 1, seed=seed, scale=spread,
            gradients=replace(drawn, rms=rms) if isinstance(rms, float | int) else drawn,
        )  # fmt: skip
        law = law.scaled(rule.scale(updated if isinstance(updated, Tensor) else plain, number))
        tensors[name], of_mean = _fraction_of(seen, updated, law, rule, sample, seed)
        variance += of_mean * elements[name] ** 2
    total = sum(elements.values())
    fraction = sum(tensors[name] * elements[name] for name in tensors) / total if total else 0.0
    return NullPrediction(fraction, sqrt(variance) / total if total else 0.0, tensors, elements)


def _work_dtype(updated: Tensor | str | None, plain: Tensor) -> torch.dtype:
    """The data type in which the optimiser works."""
    if updated is None:
        return plain.dtype
    return updated.dtype if isinstance(updated, Tensor) else torch.float32


def _updated_and_seen(
    name: str, plain: Tensor, view: torch.dtype | None, masters: bool | Mapping[str, Tensor]
) -> tuple[Tensor | Literal["uniform"] | None, Tensor]:
    """What the optimiser updates (None: what is seen, in place), and what is seen of it."""
    if view is not None and view != plain.dtype:
        if masters:
            raise MisuseError("with a view, the weights are the masters; leave masters out")
        return plain, plain.to(view)
    if not isinstance(masters, Mapping):
        return ("uniform" if masters else None), plain
    master = masters.get(name)
    if master is None or master.shape != plain.shape:
        raise MisuseError(f"there is no master of the shape of {name!r}", name=name)
    return plain_tensor(master), plain

"""The precision null over many steps: a sample of the weights, driven by random gradients through the real optimiser.

What :func:`thinwire.probe.null.predict_null` computes for one step is simulated here for all of them: moments that warm
up, schedules, decay, weights that stay where they round to, and how many weights differ from 8 or 32 steps ago. The
optimiser is of the same class as the real one, its hyperparameters are the real ones, its gradients know nothing.

A simulation starts from the weights given and goes its own way. Where a real run of many steps moves its weights
elsewhere, their null is another: bf16 weights that are pushed one way in place leave the small sizes at which they can
change. A tracker therefore sets its shadow back to the real weights whenever all lags start anew
(:meth:`Shadow.restart_from`).

>>> weights = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02}
>>> found = simulate_null(weights, lambda params: torch.optim.AdamW(params, lr=1e-5), steps=20, lags=(1, 8))
>>> len(found.fractions[1]), len(found.fractions[8]), found.fractions[8][0] > found.fractions[1][-1]
(20, 2, True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thinwire.errors import MisuseError
from thinwire.probe.changes import plain_tensor
from thinwire.probe.gradients import Gradients, gradient_source
from thinwire.probe.null import float_bounds

__all__ = ["NullSimulation", "NullStep", "Shadow", "simulate_null"]

Factory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

_PART_MIN = 64  # elements of the sample that even a small tensor gets
_BURN_IN = 256  # steps that fill the moments of a shadow of an optimiser that has been at work


@dataclass(frozen=True, slots=True)
class NullStep:
    """The share that differs from some steps ago: by name, and of all weights, with its standard error."""

    fraction: float
    error: float
    tensors: dict[str, float]


@dataclass(frozen=True, slots=True)
class NullSimulation:
    """By lag: the ``steps`` at which the sample was compared with the one of so many steps before, the ``fractions`` of
    all weights that differed, and their standard ``errors``, which come of the size of the sample."""

    steps: dict[int, list[int]]
    fractions: dict[int, list[float]]
    errors: dict[int, list[float]]


def _masters_within(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 masters that round to ``tensor``, each anywhere in its cell."""
    values, low, high, _ = float_bounds(tensor)
    share = torch.rand(tensor.numel(), generator=generator, dtype=torch.float64).numpy() * 0.998 + 0.001
    return torch.from_numpy(np.where(np.isfinite(values), low + share * (high - low), values)).float()


def _shape_of_part(tensor: Tensor, share: float) -> tuple[int, ...]:
    """A part of about ``share`` of a tensor: a square matrix of a matrix, or an optimiser would not factor it."""
    size = min(tensor.numel(), max(_PART_MIN, round(tensor.numel() * share)))
    if tensor.dim() < 2 or not size:
        return (size,)
    rows = max(1, int(sqrt(size)))
    return (rows, size // rows)


class Shadow:
    """A sample of tensors' elements that random gradients move through an optimiser of its own.

    Args:
        tensors: what the real optimiser updates, by name; floating-point. Each gives a part in proportion to its size.
        make: the optimiser, from parameter groups ``{"params": [...]}``, one a tensor in order, with further entries
            as in ``options``.
        options: a group's further entries by name of the tensor.
        view: the data type as which the tensors are seen, for all or by name; otherwise as they are.
        masters_of: ``tensors`` are views of float32 masters that are not known: update such masters, see their views.
        lags: numbers of steps after which the sample is compared with what it was.
        rms: root mean square of a tensor's gradients, by name; 1 where it is not given.
        sample: elements in total, about.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        make: Factory,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        view: torch.dtype | Mapping[str, torch.dtype] | None = None,
        masters_of: bool = False,
        lags: Sequence[int] = (1,),
        gradients: Gradients = Gradients(),  # noqa: B008
        rms: Mapping[str, float] | None = None,
        sample: int = 1 << 16,
        seed: int = 0,
    ) -> None:
        if not tensors or min(lags, default=0) < 1 or sample < 1:
            raise MisuseError("a null needs tensors, lags of at least 1 step, and a sample of at least 1 element")
        self._generator = torch.Generator().manual_seed(seed)
        self._elements = {name: plain_tensor(tensor).numel() for name, tensor in tensors.items()}
        self._view = dict(view) if isinstance(view, Mapping) else dict.fromkeys(tensors, view)
        self._masters_of = masters_of
        share = sample / max(1, sum(self._elements.values()))
        self._chosen: dict[str, Tensor] = {}
        self._params = {name: self._part(name, tensor, share) for name, tensor in tensors.items()}
        sizes = [p.numel() for p in self._params.values()]
        self._ends = np.cumsum([0, *sizes])
        self._source = gradient_source(gradients, (int(self._ends[-1]),), seed=seed + 1)
        self._rms = dict(rms or {})
        groups = [{"params": [p], **dict((options or {}).get(name, {}))} for name, p in self._params.items()]
        self.optimizer = make(groups)
        self._step = self._drawn = 0
        self._lags = {lag: self._seen() for lag in lags}

    def _part(self, name: str, tensor: Tensor, share: float) -> nn.Parameter:
        flat = plain_tensor(tensor).reshape(-1)
        if not flat.is_floating_point():
            raise MisuseError(f"{name!r} is {flat.dtype}; only floating-point weights have a null", name=name)
        shape = _shape_of_part(plain_tensor(tensor), share)
        size = int(np.prod(shape))
        if size < flat.numel():
            chosen = torch.randint(flat.numel(), (size,), generator=self._generator)
            self._chosen[name] = chosen.to(flat.device)
            flat = flat[self._chosen[name]]
        part = flat.detach().to("cpu", copy=True)
        if self._masters_of:
            self._view[name] = self._view.get(name) or part.dtype
            part = _masters_within(part, self._generator)
        return nn.Parameter(part.view(shape))

    def _seen(self) -> Tensor:
        """The sample as it is seen, as bits."""
        parts = ((p.detach().reshape(-1), self._view.get(name)) for name, p in self._params.items())
        seen = [part if view is None else part.to(view) for part, view in parts]
        if any(part.dtype == torch.float64 for part in seen):
            return torch.cat([part.double() for part in seen]).view(torch.int64)
        return torch.cat([part.float() for part in seen]).view(torch.int32)

    def burn_in(self, steps: int) -> None:
        """Fill the optimiser's moments as ``steps`` steps (at most 256) would, leaving the weights as they are."""
        before = [p.detach().clone() for p in self._params.values()]
        for _ in range(min(steps, _BURN_IN)):
            self._move()
            for p, old in zip(self._params.values(), before, strict=True):
                p.data.copy_(old)
        for p in self._params.values():
            count = self.optimizer.state[p].get("step")
            if isinstance(count, Tensor):
                count.fill_(max(float(count), float(steps)))

    def _move(self) -> None:
        drawn = next(self._source)
        self._drawn += 1
        for k, (name, p) in enumerate(self._params.items()):
            gradient = drawn[self._ends[k] : self._ends[k + 1]].view(p.shape) * self._rms.get(name, 1.0)
            p.grad = gradient.to(p.dtype)
        self.optimizer.step()

    @torch.no_grad()
    def restart_from(self, tensors: Mapping[str, Tensor]) -> bool:
        """Take over the sampled elements of ``tensors`` as they are now, if all lags start anew after the last step.

        The optimiser's state stays; a tensor of another size than at first is left as it was. Returns whether lags did.
        """
        if self._masters_of or any(self._step % lag for lag in self._lags):
            return False
        for name, p in self._params.items():
            flat = plain_tensor(tensors[name]).reshape(-1)
            if flat.numel() != self._elements[name]:
                continue
            chosen = self._chosen.get(name)
            part = flat[: p.numel()] if chosen is None else flat[chosen.to(flat.device)]
            p.copy_(part.view(p.shape))
        now = self._seen()
        self._lags = dict.fromkeys(self._lags, now)
        return True

    def set_rms(self, rms: Mapping[str, float]) -> None:
        """The size of the gradients from the next step on, by name."""
        self._rms.update(rms)

    def step(self) -> dict[int, NullStep]:
        """Make one step; by lag, what differs from so many steps ago, for the lags that divide the number of steps."""
        self._move()
        self._step += 1
        due = [lag for lag in self._lags if self._step % lag == 0]
        now = self._seen() if due else torch.empty(0)
        found = {}
        for lag in due:
            found[lag] = self._counted((now != self._lags[lag]).numpy())
            self._lags[lag] = now
        return found

    def _counted(self, differ: Any) -> NullStep:
        total = sum(self._elements.values())
        tensors, fraction, variance = {}, 0.0, 0.0
        for k, (name, elements) in enumerate(self._elements.items()):
            size = int(self._ends[k + 1] - self._ends[k])
            count = int(differ[self._ends[k] : self._ends[k + 1]].sum())
            tensors[name] = count / size if size else 0.0
            weight = elements / total if total else 0.0
            fraction += weight * tensors[name]
            if size and size < elements:  # a share near 0 has an error, too (Agresti and Coull 1998)
                share = (count + 2) / (size + 4)
                variance += weight**2 * share * (1 - share) / size
        return NullStep(fraction, sqrt(variance), tensors)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, for ``torch.save``."""
        return {
            "params": {name: p.detach().clone() for name, p in self._params.items()},
            "optimizer": self.optimizer.state_dict(), "lags": dict(self._lags), "step": self._step,
            "drawn": self._drawn, "rms": dict(self._rms),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a shadow of equal tensors and options was. Gradients drawn so far are drawn again and dropped."""
        shapes = {name: tuple(p.shape) for name, p in state["params"].items()}
        if shapes != {name: tuple(p.shape) for name, p in self._params.items()} or set(state["lags"]) != set(
            self._lags
        ):
            raise MisuseError("the saved null is of other tensors or lags; make the tracker as the saved one was")
        for name, p in self._params.items():
            p.data.copy_(state["params"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self._lags, self._step = dict(state["lags"]), int(state["step"])
        self._rms = dict(state["rms"])
        for _ in range(self._drawn, int(state["drawn"])):
            next(self._source)
        self._drawn = int(state["drawn"])


def simulate_null(
    weights: Tensor | Mapping[str, Tensor] | nn.Module,
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
    *,
    steps: int,
    lr: Callable[[int], float] | None = None,
    view: torch.dtype | None = None,
    masters: bool = False,
    lags: Sequence[int] = (1,),
    gradients: Gradients = Gradients(),  # noqa: B008
    gradient_rms: float | Mapping[str, float] = 1.0,
    sample: int = 1 << 16,
    seed: int = 0,
) -> NullSimulation:
    """How many weights would change over ``steps`` steps if gradients were random.

    Args:
        weights: a tensor, tensors by name, or a module (its parameters that require gradients).
        optimizer: makes the optimiser of parameter groups, such as ``lambda p: torch.optim.AdamW(p, lr=1e-6)``.
        lr: the learning rate of each step, counted from 1; None leaves the optimiser's.
        view: the data type as which float32 ``weights`` are seen. masters: ``weights`` are views of unknown masters.
        lags: compare with so many steps before, at multiples of it.
        gradients, gradient_rms: their distribution, correlation and size; Adam and Adafactor do not see the size.
        sample: elements in total, about; all tensors have their share. The cost follows the sample, not the model.

    Raises:
        MisuseError: nothing to sample, weights that are no floats, no steps, a lag below 1.
    """
    if steps < 1:
        raise MisuseError(f"steps={steps}; simulate at least 1")
    if isinstance(weights, Tensor):
        weights = {"": weights}
    named = dict(weights) if isinstance(weights, Mapping) else _trained(weights)
    rms = {n: gradient_rms[n] if isinstance(gradient_rms, Mapping) else gradient_rms for n in named}
    shadow = Shadow(
        named,
        optimizer,
        view=view,
        masters_of=masters,
        lags=lags,
        gradients=gradients,
        rms=rms,
        sample=sample,
        seed=seed,
    )
    found = NullSimulation({k: [] for k in lags}, {k: [] for k in lags}, {k: [] for k in lags})
    for step in range(1, steps + 1):
        if lr is not None:
            for group in shadow.optimizer.param_groups:
                group["lr"] = lr(step)
        for lag, null in shadow.step().items():
            found.steps[lag].append(step)
            found.fractions[lag].append(null.fraction)
            found.errors[lag].append(null.error)
    return found


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

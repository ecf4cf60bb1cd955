"""Which weights will change in the next step? What can be known before it, and how well it foretells.

A weight that is published in bf16 changes when its fp32 master crosses the boundary where rounding turns. Before the
gradient is known, the optimiser's state foretells the update, the master how far the boundary is, and the past how
often it was crossed. :func:`features` reads all that off a sample of the weights, :data:`PREDICTORS` turn it into
scores, and :func:`score` compares them with what then changed. Models that learn from features are in
:mod:`thinwire.probe.prediction_models`.

>>> layer = torch.nn.Linear(64, 64)
>>> optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5)
>>> watch = Watch(dict(layer.named_parameters()), optimizer, sample=1000)
>>> for _ in range(3):
...     layer(torch.randn(8, 64)).square().sum().backward()
...     known = watch.before()
...     optimizer.step()
...     changed = watch.after()
>>> found = score(PREDICTORS["boundary"](known), changed)
>>> found.average_precision > found.base_rate
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinwire.errors import MisuseError

__all__ = [
    "FEATURES",
    "PREDICTORS",
    "ChangeHistory",
    "Features",
    "PredictionScore",
    "Watch",
    "features",
    "sample_positions",
    "score",
]

Features = dict[str, Tensor]
Positions = dict[str, Tensor]

FEATURES = ("momentum", "step", "distance", "margin", "ulp", "last", "frequency")
"""Names of what :func:`features` returns."""

_FLOOR = 2.0**-200


def sample_positions(params: Mapping[str, Tensor], count: int, *, seed: int = 0) -> Positions:
    """``count`` weights (all, if there are no more) drawn alike from all tensors: flat positions, ascending, by name.

    A tensor that comes under several names is drawn from under the first.

    Raises:
        MisuseError: ``count`` is less than 1.
    """
    if count < 1:
        raise MisuseError(f"a sample has 1 weight or more, not {count}", count=count)
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for name, tensor in params.items():
        if id(tensor) not in seen and tensor.is_floating_point():
            seen.add(id(tensor))
            sizes[name] = tensor.numel()
    total = sum(sizes.values())
    generator = torch.Generator().manual_seed(seed)
    if count >= total:
        return {name: torch.arange(size) for name, size in sizes.items()}
    drawn = _unique(torch.randint(0, total, (count,), generator=generator))
    while len(drawn) < count:  # those that were drawn twice, again
        more = torch.randint(0, total, (2 * (count - len(drawn)),), generator=generator)
        fresh = _unique(more[torch.isin(more, drawn, invert=True)])
        fresh = fresh[torch.randperm(len(fresh), generator=generator)[: count - len(drawn)]]
        drawn = _unique(torch.cat([drawn, fresh]))
    found, start = {}, 0
    for name, size in sizes.items():
        low, high = torch.searchsorted(drawn, torch.tensor([start, start + size])).tolist()
        found[name] = drawn[low:high] - start
        start += size
    return found


class ChangeHistory:
    """Which sampled weights changed, as ``view`` shows them: in the last step, and in what share of all steps."""

    def __init__(self, positions: Mapping[str, Tensor], *, view: torch.dtype | None = torch.bfloat16) -> None:
        self.positions, self.view = dict(positions), view
        self.steps = 0
        size = sum(len(p) for p in self.positions.values())
        self.last = torch.zeros(size, dtype=torch.bool)
        self.counts = torch.zeros(size, dtype=torch.int32)
        self._bits: Tensor | None = None

    def observe(self, params: Mapping[str, Tensor]) -> Tensor | None:
        """Compare with what was observed last: bool [S], True where any bit changed; None at the first time."""
        now = torch.cat([self._read(params[name], at) for name, at in self.positions.items()] or [torch.zeros(0)])
        before, self._bits = self._bits, now
        if before is None:
            return None
        self.last = before != now
        self.counts += self.last
        self.steps += 1
        return self.last

    def _read(self, tensor: Tensor, at: Tensor) -> Tensor:
        values = _take(tensor, at)
        seen = values if self.view is None else values.to(self.view)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[seen.element_size()]
        return seen.contiguous().view(bits).long()


def features(
    params: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    history: ChangeHistory,
) -> Features:
    """What is known of the history's weights before a step: float32 [S] each, finite.

    ============  ===================================================================================================
    ``momentum``  Adam's |m| / (sqrt(v) + eps), both corrected for bias: 1 where gradients agree, 0 where they cancel;
                  the size of the momentum for other optimisers
    ``step``      log2 of the update that this foretells, with learning rate and weight decay
    ``distance``  log2 of the way from the weight to where its rounding turns, in the direction of that update
    ``margin``    their difference: above 0 the weight would change
    ``ulp``       log2 of the distance between neighbouring floats there, as the history views them
    ``last``      1 where the weight changed in the last step
    ``frequency`` the share of observed steps in which it changed
    ============  ===================================================================================================

    ``params`` are the tensors that ``optimizer`` steps: fp32 masters, or weights in any float type. State that there
    is not (before the first step) counts as 0.

    Raises:
        MisuseError: a tensor of the history is missing.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts: dict[str, list[Tensor]] = {name: [] for name in FEATURES}
    for name, at in history.positions.items():
        if name not in params:
            raise MisuseError(f"the history samples {name!r}, which is not among the weights", name=name)
        tensor = params[name]
        weight = _take(tensor, at).double()
        momentum, update = _foretold(tensor, weight, at, optimizer.state.get(tensor, {}), groups.get(id(tensor)))
        view = tensor.dtype if history.view is None else history.view
        distance, ulp = _boundary(weight, update, view)
        step = update.abs().clamp(min=_FLOOR).log2()
        parts["momentum"].append(momentum)
        parts["step"].append(step)
        parts["distance"].append(distance.clamp(min=_FLOOR).log2())
        parts["margin"].append(step - parts["distance"][-1])
        parts["ulp"].append(ulp.log2())
    found = {name: torch.cat(tensors) if tensors else torch.zeros(0) for name, tensors in parts.items() if tensors}
    found = {name: found.get(name, torch.zeros(0)) for name in FEATURES}
    found["last"] = history.last
    found["frequency"] = history.counts.double() / max(history.steps, 1)
    return {n: torch.nan_to_num(t.float(), nan=0.0, posinf=1e30, neginf=-1e30) for n, t in found.items()}


def _foretold(
    tensor: Tensor, weight: Tensor, at: Tensor, state: Mapping[str, Any], group: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor]:
    """The size of the momentum, and the update if the next gradient were what the momentum expects."""
    zero = torch.zeros_like(weight)
    if group is None:
        return zero, zero
    lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    if "exp_avg" in state:
        beta1, beta2 = group.get("betas", (0.9, 0.999))
        steps = max(float(state.get("step", 1)), 1.0)
        first = _take(state["exp_avg"], at).double() / (1 - beta1**steps)
        second = zero + 1.0
        if isinstance(state.get("exp_avg_sq"), Tensor) and state["exp_avg_sq"].shape == tensor.shape:
            second = (_take(state["exp_avg_sq"], at).double() / (1 - beta2**steps)).clamp(min=0).sqrt()
        direction = first / (second + float(group.get("eps", 1e-8)))
    elif isinstance(state.get("momentum_buffer"), Tensor):
        direction = _take(state["momentum_buffer"], at).double()
    else:
        direction = zero
    return direction.abs(), -lr * (direction + decay * weight)


def _boundary(weight: Tensor, update: Tensor, view: torch.dtype) -> tuple[Tensor, Tensor]:
    """How far the weight (float64) is from where its rounding to ``view`` turns, towards ``update``; and the ULP."""
    info = torch.finfo(view)
    seen = weight.to(view).double()
    mantissa, exponent = torch.frexp(seen.abs())
    smallest = info.smallest_normal * info.eps
    ulp = torch.ldexp(torch.full_like(seen, info.eps), exponent - 1)
    ulp = torch.where(seen == 0, smallest, ulp).clamp(min=smallest)
    towards_zero = torch.sign(update) * torch.sign(seen) < 0
    below = torch.where((mantissa == 0.5) & towards_zero, (ulp / 2).clamp(min=smallest), ulp)
    way = torch.where(update < 0, -1.0, 1.0)
    return ((seen + way * below / 2 - weight) * way).clamp(min=0), ulp


class Watch:
    """A history and features around each step: ``before()`` it, then the step, then ``after()`` it.

    ``params``: the tensors that ``optimizer`` steps, by name; frozen ones may be among them. At most ``sample`` of the
    weights are looked at. ``view``: the data type that workers receive; None for the weights' own.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        sample: int = 1 << 20,
        view: torch.dtype | None = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        self._params, self._optimizer = dict(params), optimizer
        self.history = ChangeHistory(sample_positions(params, sample, seed=seed), view=view)
        self.history.observe(params)

    def before(self) -> Features:
        """What is known before the step."""
        return features(self._params, self._optimizer, self.history)

    def after(self) -> Tensor:
        """Which of the sampled weights the step changed: bool [S]."""
        changed = self.history.observe(self._params)
        assert changed is not None  # the first observation was made when this was
        return changed


def _random(known: Features) -> Tensor:
    return torch.rand(len(known["last"]), generator=torch.Generator().manual_seed(0))


PREDICTORS: dict[str, Callable[[Features], Tensor]] = {
    "random": _random,
    "last step": lambda known: known["last"],
    "frequency": lambda known: known["frequency"],
    "momentum": lambda known: known["momentum"],
    "magnitude": lambda known: -known["ulp"],
    "step / ulp": lambda known: known["step"] - known["ulp"],
    "boundary": lambda known: known["margin"],
}
"""Scores [S] by features: the higher, the likelier to change. ``magnitude`` says: the smaller a weight, the likelier;
``step / ulp`` measures the foretold update by it, and ``boundary`` by the way that is left."""


@dataclass(frozen=True, slots=True)
class PredictionScore:
    """How well scores foretold which weights changed.

    ``precision``, ``recall`` and ``f1`` are of the ``count`` weights with the highest scores; equal scores at that
    cut count by their share, as if drawn. By default ``count`` is the number that changed, and the three are one
    number. ``average_precision`` is the area under precision over recall (sklearn's definition), which for scores
    that know nothing is ``base_rate``, the share that changed. NaN where nothing changed: nothing could be foretold.
    """

    precision: float
    recall: float
    f1: float
    average_precision: float
    base_rate: float
    count: int

    @property
    def lift(self) -> float:
        """Average precision over that of knowing nothing."""
        return self.average_precision / self.base_rate if self.base_rate else float("nan")


def score(predicted: Tensor, changed: Tensor, *, count: int | None = None) -> PredictionScore:
    """Compare scores [S] with what changed, bool [S].

    Raises:
        MisuseError: shapes differ, scores are NaN, no weights, or a count that is not in 0 to S.

    >>> score(torch.tensor([0.9, 0.2, 0.8, 0.1]), torch.tensor([True, True, False, False]))
    PredictionScore(precision=0.5, recall=0.5, f1=0.5, average_precision=0.83..., base_rate=0.5, count=2)
    """
    if predicted.shape != changed.shape or predicted.dim() != 1 or changed.dtype != torch.bool or not len(changed):
        raise MisuseError(
            f"scores {tuple(predicted.shape)} and changes {changed.dtype} {tuple(changed.shape)} are [S] and bool [S]"
        )
    values = predicted.double()
    if bool(values.isnan().any()):
        raise MisuseError("scores hold NaN; a predictor must say something of every weight")
    size, right = len(changed), int(changed.sum())
    count = right if count is None else count
    if not 0 <= count <= size:
        raise MisuseError(f"the highest {count} of {size} scores cannot be taken", count=count)
    order = values.argsort(descending=True)
    ranked, hits = values[order], changed[order].double().cumsum(0)
    ends = torch.cat([(ranked[1:] != ranked[:-1]).nonzero().flatten(), torch.tensor([size - 1])])  # of equal scores
    taken, found = (ends + 1).double(), hits[ends]
    base = right / size
    if right == 0:
        return PredictionScore(0.0, float("nan"), float("nan"), float("nan"), base, count)
    gains = torch.diff(found, prepend=torch.zeros(1, dtype=torch.float64))
    average = float((found / taken * gains).sum() / right)
    right_taken = _at(taken, found, count)
    precision = right_taken / count if count else 0.0
    recall = right_taken / right
    f1 = 2 * right_taken / (count + right)
    return PredictionScore(precision, recall, f1, average, base, count)


def _at(taken: Tensor, found: Tensor, count: int) -> float:
    """Right ones among the first ``count``, on a straight line between the ends of equal scores."""
    at = int(torch.searchsorted(taken, float(count)))
    if at >= len(taken):
        return float(found[-1])
    start, before = (float(taken[at - 1]), float(found[at - 1])) if at else (0.0, 0.0)
    return before + (float(found[at]) - before) * (count - start) / (float(taken[at]) - start)


def _unique(values: Tensor) -> Tensor:
    found: Tensor = torch.unique_consecutive(values.sort().values)
    return found


def _take(tensor: Tensor, at: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[at.to(tensor.device)].cpu()

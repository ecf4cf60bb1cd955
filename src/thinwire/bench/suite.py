"""Four tasks on tiny models that are trained in the run: experts, every merge method, and the router, side by side.

The tasks are functions of two numbers; a token says which one is asked for, so that one model can hold all. The base
has learnt a little of each; an expert is the base with a tenth of its weights trained further on one task. A method's
lambda is the one of four that is best on the training pairs; what is shown are pairs that no training has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch

from thinwire.bench.measure import machine, versions
from thinwire.errors import MisuseError
from thinwire.integrations.merging import merge, patch_between
from thinwire.integrations.router import SparseTaskRouter
from thinwire.merge.methods import METHODS
from thinwire.wire.patch import Patch

__all__ = ["TASKS", "SuiteOptions", "run_suite"]

Row = dict[str, Any]
State = dict[str, torch.Tensor]

_NUMBERS = 24
TASKS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "larger": torch.maximum,
    "smaller": torch.minimum,
    "near": lambda a, b: ((a - b).abs() < 6).long(),
    "sum is high": lambda a, b: (a + b >= _NUMBERS).long(),
}
_LAMBDAS = (0.15, 0.3, 0.6, 1.0)


@dataclass(frozen=True, slots=True)
class SuiteOptions:
    """Steps of the base and of each expert, the share of weights an expert trains, and the seeds (one run each)."""

    base_steps: int = 60
    expert_steps: int = 300
    density: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = tuple(METHODS)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.seeds or min(self.base_steps, self.expert_steps) < 1 or not 0 < self.density <= 1:
            raise MisuseError(f"steps and density are positive, there is a seed, and methods are known ({unknown} not)")


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width, wide = 64, 256
        self.first, self.second = torch.nn.Embedding(_NUMBERS, width), torch.nn.Embedding(_NUMBERS, width)
        self.asked = torch.nn.Embedding(len(TASKS), width)
        self.hidden = torch.nn.Sequential(
            torch.nn.Linear(width, wide), torch.nn.GELU(), torch.nn.Linear(wide, wide), torch.nn.GELU()
        )
        self.head = torch.nn.Linear(wide, _NUMBERS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.hidden(self.first(x[:, 0]) + self.second(x[:, 1]) + self.asked(x[:, 2])))
        return found


@dataclass(frozen=True, slots=True)
class _Data:
    """Pairs with the number of a task [n, 3], answers [n], and which pairs no training sees [n]."""

    x: torch.Tensor
    y: torch.Tensor
    held_out: torch.Tensor

    def of(self, task: int | None, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        keep = self.held_out == held_out
        if task is not None:
            keep &= self.x[:, 2] == task
        return self.x[keep], self.y[keep]


def _data(generator: torch.Generator) -> _Data:
    pairs = torch.cartesian_prod(torch.arange(_NUMBERS), torch.arange(_NUMBERS))
    held_out = torch.rand(len(pairs), generator=generator) < 0.25
    x = torch.cat([torch.cat([pairs, torch.full((len(pairs), 1), t)], dim=1) for t in range(len(TASKS))])
    y = torch.cat([function(pairs[:, 0], pairs[:, 1]) for function in TASKS.values()])
    return _Data(x, y, held_out.repeat(len(TASKS)))


def _train(
    model: _Net, data: tuple[torch.Tensor, torch.Tensor], steps: int, generator: torch.Generator, density: float
) -> None:
    """AdamW; of each tensor only the share with the largest gradients at the beginning moves."""
    x, y = data
    parameters = list(model.parameters())
    torch.autograd.backward(torch.nn.functional.cross_entropy(model(x), y))
    masks = []
    for parameter in parameters:
        assert parameter.grad is not None
        size = parameter.grad.abs().flatten()
        count = max(1, round(density * size.numel()))
        masks.append(parameter.grad.abs() >= size.topk(count).values[-1])
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(model(x[rows]), y[rows]))
        optimizer.step()
        if density < 1:
            with torch.no_grad():
                for parameter, mask, before in zip(parameters, masks, start, strict=True):
                    parameter.copy_(torch.where(mask, parameter, before))


def _rounded(model: _Net) -> State:
    return {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def _accuracy(state: State, data: _Data, held_out: bool) -> list[float]:
    """Share of right answers, task by task."""
    model = _Net().to(torch.bfloat16)
    model.load_state_dict(state)
    found = []
    with torch.no_grad():
        for task in range(len(TASKS)):
            x, y = data.of(task, held_out)
            found.append(float((model(x).argmax(dim=1) == y).float().mean()))
    return found


def _best_merge(base: State, patches: list[Patch], method: str, data: _Data) -> list[float]:
    """Accuracies on held-out pairs with the lambda that is best on the others."""
    fixed = {"density": 0.5} if "density" in METHODS[method].parameters else {}
    merged = [merge(base, patches, method=method, lambda_=value, **fixed) for value in _LAMBDAS]
    return _accuracy(max(merged, key=lambda state: fmean(_accuracy(state, data, False))), data, True)


def _routed(base: State, patches: dict[str, Patch], data: _Data) -> list[float]:
    """The router on one mixed batch of all tasks: each row with the task it asks for."""
    model = _Net().to(torch.bfloat16)
    model.load_state_dict(base)
    router = SparseTaskRouter(model, patches)
    x, y = data.of(None, True)
    names = list(TASKS)
    with torch.no_grad():
        right = router.forward(x, task_id=[names[t] for t in x[:, 2].tolist()]).argmax(dim=1) == y
    return [float(right[x[:, 2] == task].float().mean()) for task in range(len(names))]


def _one_seed(options: SuiteOptions, seed: int, report: Callable[[str], None]) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    data, model = _data(generator), _Net()
    report(f"seed {seed}: base")
    _train(model, data.of(None, False), options.base_steps, generator, 1.0)
    base = _rounded(model)
    found = {"base": _accuracy(base, data, True)}
    experts, patches = [], {}
    for task, name in enumerate(TASKS):
        report(f"seed {seed}: {name}")
        model.load_state_dict(base)
        _train(model, data.of(task, False), options.expert_steps, generator, options.density)
        expert = _rounded(model)
        experts.append(_accuracy(expert, data, True))
        patches[name] = patch_between(base, expert)
    for name, accuracies in zip(TASKS, experts, strict=True):
        found[f"expert: {name}"] = accuracies
    found["router"] = _routed(base, patches, data)
    for method in options.methods:
        report(f"seed {seed}: {method}")
        found[method] = _best_merge(base, list(patches.values()), method, data)
    return found


def run_suite(options: SuiteOptions, *, report: Callable[[str], None] = lambda _: None) -> list[Row]:
    """One row for each model: its accuracy on each task and on average, over the seeds (mean and spread)."""
    seeds = [_one_seed(options, seed, report) for seed in options.seeds]
    facts = {
        "bench": "merge-suite",
        "density": options.density,
        "steps": [options.base_steps, options.expert_steps],
        "seeds": list(options.seeds),
        "machine": machine(),
        "versions": versions(),
    }
    rows = []
    for name in seeds[0]:
        tasks = {t: round(fmean(found[name][i] for found in seeds), 4) for i, t in enumerate(TASKS)}
        means = [fmean(found[name]) for found in seeds]
        rows.append(
            {**facts, "model": name, "tasks": tasks, "mean": round(fmean(means), 4), "sd": round(pstdev(means), 4)}
        )
    return rows

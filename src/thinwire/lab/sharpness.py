"""Do sharp advantages make sparse updates? The same answers, learned from with advantages smoothed more and more.

GRPO's advantages are sharp: most answers of a batch carry none, and a rare success carries much. Here a policy is
warmed up, then trained from the same weights several times on its own answers, and only the advantages differ:

===============  ====================================================================================================
smoothing        advantages, brought back to their root mean square afterwards
===============  ====================================================================================================
``none``         as they are
``noise``        plus Gaussian noise of ``level`` times their root mean square: every answer counts for something
``temperature``  ``sign(A) |A|^(1/level)``: above 1 all answers that count do so alike, below 1 the rarest dominate
``shuffled``     permuted within the batch: as sharp, but they say nothing
===============  ====================================================================================================

Each step says how sharp the advantages were (their effective number: ``(sum A^2)^2 / sum A^4``), in how many
directions the gradient and the update lie (effective ranks, averaged over matrices by their weights), in how many the
answers' gradients lie (the advantage-weighted tangent kernel), and which share of the bf16 weights changed.

An Adam step hardly depends on how large a gradient is: at the first step every weight with a gradient moves by the
learning rate, whatever the advantages. So the optimiser may be replaced by gradient descent whose every step has the
root mean square ``lr`` (``descent``), in which large gradients do move further.

Example (seconds; needs the extra ``rl``)::

    rows = sharpness(SharpnessOptions(seeds=(0,), steps=2))
    for line in summarise(rows):
        print(line["smoothing"], line["level"], line["density"])
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.lab.grpo import advantages, grpo_loss
from thinwire.lab.optimiser import MasterAdamW
from thinwire.lab.recipes import RECIPES, Recipe
from thinwire.lab.rollouts import Rollouts, concatenate, token_logprobs
from thinwire.lab.training import rollouts_for, warm_start
from thinwire.probe.rank import Kind, effective_rank, rank_of
from thinwire.probe.spectrum import spectrum_of_gram
from thinwire.probe.tangent import advantage_kernel, tangent_kernel

__all__ = ["SMOOTHINGS", "SharpnessOptions", "effective_number", "sharpness", "smooth", "summarise"]

Row = dict[str, Any]

SMOOTHINGS: tuple[tuple[str, float], ...] = (
    ("none", 0.0),
    ("noise", 0.3),
    ("noise", 1.0),
    ("noise", 10.0),
    ("temperature", 0.5),
    ("temperature", 2.0),
    ("temperature", 8.0),
    ("shuffled", 0.0),
)
"""Smoothings and their levels, the plain advantages first."""


@dataclass(frozen=True, slots=True)
class SharpnessOptions:
    """What to run. ``lr`` None is the recipe's; ``optimiser`` is ``adamw`` or ``descent``. Ranks and kernels are
    measured at the steps in ``measured`` (from 1); a kernel is that of at most ``kernel_answers`` answers."""

    recipe: str = "nano"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 8
    lr: float | None = 1e-5
    optimiser: Literal["adamw", "descent"] = "adamw"
    smoothings: tuple[tuple[str, float], ...] = SMOOTHINGS
    rank: Kind = "entropy"
    measured: tuple[int, ...] = (1, 8)
    kernel_answers: int = 64


def sharpness(options: SharpnessOptions | None = None, *, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """One row for each seed, smoothing and step; ``on_row`` is shown each as it comes.

    A row has ``seed``, ``smoothing``, ``level``, ``step``, ``answers``; ``reward`` (the batch's mean), ``number``
    (effective number of answers), ``density`` (share of bf16 weights that changed in this step) and ``density_total``
    (since the start), and, at measured steps, ``rank_gradient``, ``rank_update`` (of the fp32 masters' step),
    ``rank_kernel`` and ``rank_kernel_weighted`` (of the kernel K and of diag(A) K diag(A)), ``energy_first`` (share of
    the latter's trace in its first eigenvalue).

    Raises:
        MisuseError: unknown recipe, optimiser, smoothing or level; no step; the warm start fails.
    """
    options = options or SharpnessOptions()
    if options.recipe not in RECIPES:
        raise MisuseError(f"there is no recipe {options.recipe!r}; use one of {', '.join(RECIPES)}")
    if options.optimiser not in ("adamw", "descent"):
        raise MisuseError(f"there is no optimiser {options.optimiser!r}; use adamw or descent")
    if options.steps < 1:
        raise MisuseError(f"an experiment takes 1 step or more, not {options.steps}", steps=options.steps)
    for name, level in options.smoothings:
        smooth(torch.ones(2), name, level, torch.Generator())
    recipe = RECIPES[options.recipe]()
    rows: list[Row] = []
    for seed in options.seeds:
        start = recipe.pretrained(seed)
        warm_start(recipe, start, seed=seed)
        for smoothing, level in options.smoothings:
            for row in _run(recipe, copy.deepcopy(start), options, seed, smoothing, level):
                rows.append(row)
                if on_row is not None:
                    on_row(row)
    return rows


def smooth(advantage: Tensor, smoothing: str, level: float, generator: torch.Generator) -> Tensor:
    """Advantages [B] with the same root mean square, smoothed (or sharpened); all zeros stay so.

    Raises:
        MisuseError: unknown smoothing; a noise below 0 or a temperature of 0 or less.

    >>> smooth(torch.tensor([2.0, 0.0, -1.0]), "temperature", 1e6, torch.Generator())
    tensor([ 1.5811,  0.0000, -1.5811])
    """
    scale = advantage.square().mean().sqrt()
    if smoothing == "none":
        return advantage.clone()
    if smoothing == "shuffled":
        return advantage[torch.randperm(len(advantage), generator=generator)]
    if smoothing == "noise" and level >= 0:
        noisy = advantage + level * scale * torch.randn(advantage.shape, generator=generator)
    elif smoothing == "temperature" and level > 0:
        noisy = advantage.sign() * advantage.abs().div(advantage.abs().max().clamp(min=1e-30)).pow(1 / level)
    else:
        raise MisuseError(
            f"smoothing {smoothing!r} at level {level} is none of none, shuffled, noise (0 or more) and temperature "
            "(more than 0)",
            smoothing=smoothing,
            level=level,
        )
    size = noisy.square().mean().sqrt()
    return noisy * (scale / size) if float(size) > 0 else torch.zeros_like(advantage)


def effective_number(advantage: Tensor) -> float:
    """How many answers carry the advantages [B]: ``(sum A^2)^2 / sum A^4``, from 1 to B; 0 if there is none.

    >>> effective_number(torch.tensor([1.0, -1.0, 0.0, 0.0]))
    2.0
    """
    squares = advantage.double().square()
    total = float(squares.square().sum())
    return float(squares.sum().square()) / total if total > 0 else 0.0


def _run(recipe: Recipe, model: Any, options: SharpnessOptions, seed: int, smoothing: str, level: float) -> list[Row]:
    lr = recipe.lr if options.lr is None else options.lr
    optimiser = MasterAdamW(model, lr=lr) if options.optimiser == "adamw" else _Descent(model, lr)
    source, sampling = random.Random(f"rollouts {seed}"), torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    first = _copies(model)
    rows = []
    for step in range(1, options.steps + 1):
        batch = concatenate(
            [rollouts_for(recipe, model, source, sampling) for _ in range(recipe.batches)], pad=recipe.tokenizer.pad
        )
        advantage = smooth(advantages(batch.rewards, recipe.group), smoothing, level, noise)
        before, masters = _copies(model), [master.clone() for master in optimiser.masters()]
        row: Row = {"seed": seed, "smoothing": smoothing, "level": level, "step": step, "answers": len(batch.rewards)}
        row |= {"reward": float(batch.rewards.mean()), "number": effective_number(advantage)}
        measured = step in options.measured
        if measured:
            row |= _kernel_ranks(model, batch, advantage, options)
        _gradient(model, batch, advantage, recipe.rows_max)
        if measured:
            row["rank_gradient"] = _mean_rank([w.grad for w in model.parameters() if w.grad is not None], options.rank)
        optimiser.step()
        if measured:
            moved = [now - then for now, then in zip(optimiser.masters(), masters, strict=True)]
            row["rank_update"] = _mean_rank(moved, options.rank)
        row["density"], row["density_total"] = _density(model, before, names), _density(model, first, names)
        rows.append(row)
    return rows


class _Descent:
    """Gradient descent on fp32 masters; every step has the root mean square ``lr`` over all weights."""

    def __init__(self, model: Any, lr: float) -> None:
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._masters = [weight.detach().to(torch.float32, copy=True) for weight in self._weights]
        self._lr = lr

    def masters(self) -> Iterator[Tensor]:
        return iter(self._masters)

    @torch.no_grad()
    def step(self) -> float:
        gradients = [torch.zeros_like(m) if w.grad is None else w.grad.float() for w, m in self._pairs()]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        scale = self._lr * math.sqrt(sum(m.numel() for m in self._masters)) / norm if norm else 0.0
        for (weight, master), gradient in zip(self._pairs(), gradients, strict=True):
            master -= scale * gradient
            weight.copy_(master)
            weight.grad = None
        return norm

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._weights, self._masters, strict=True))


def _copies(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def _gradient(model: Any, batch: Rollouts, advantage: Tensor, rows_max: int) -> None:
    """Add the gradient of the clipped objective with these advantages, those of 0 left out."""
    for rows in torch.split(advantage.nonzero().flatten(), rows_max):
        if len(rows):
            logprobs = token_logprobs(model, batch.tokens[rows], batch.attention[rows], first=batch.prompt_width)
            loss = grpo_loss(logprobs, batch.logprobs[rows], batch.mask[rows], advantage[rows])
            torch.autograd.backward(loss * (len(rows) / len(advantage)))


def _kernel_ranks(model: Any, batch: Rollouts, advantage: Tensor, options: SharpnessOptions) -> Row:
    """Of the kernel of whole answers' mean log-probabilities, which is what the objective weights."""
    chosen = slice(0, options.kernel_answers)
    lengths = batch.mask[chosen].sum(dim=1, keepdim=True).clamp(min=1)
    inputs = {
        "tokens": batch.tokens[chosen],
        "attention": batch.attention[chosen],
        "mask": batch.mask[chosen] / lengths,
    }
    kernel = tangent_kernel(model, inputs, "logprob")
    weighted = spectrum_of_gram(advantage_kernel(kernel, advantage[chosen]))
    first = float(weighted.values[0].square()) / weighted.energy if weighted.energy > 0 else math.nan
    return {
        "rank_kernel": rank_of(spectrum_of_gram(kernel), options.rank),
        "rank_kernel_weighted": rank_of(weighted, options.rank),
        "energy_first": first,
    }


def _mean_rank(tensors: Sequence[Tensor], kind: Kind) -> float:
    """The matrices' effective ranks as shares of the largest possible, averaged by the number of weights."""
    matrices = [tensor for tensor in tensors if tensor.dim() >= 2]
    total = sum(tensor.numel() for tensor in matrices)
    shares = [effective_rank(t, kind) / min(t.shape[0], t.numel() // t.shape[0]) * t.numel() for t in matrices]
    return sum(shares) / total if total else 0.0


def _density(model: Any, before: dict[str, Tensor], names: Sequence[str]) -> float:
    """Share of weights whose bits differ; tied ones count once."""
    weights = dict(model.named_parameters())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    changed = total = 0
    for name in names:
        now, then = weights[name].detach(), before[name]
        kind = bits[now.element_size()]
        changed += int((now.contiguous().view(kind) != then.contiguous().view(kind)).sum())
        total += now.numel()
    return changed / max(total, 1)


MEASURES = (
    "number", "reward", "density", "density_total", "rank_gradient", "rank_update", "rank_kernel",
    "rank_kernel_weighted", "energy_first",
)  # fmt: skip
"""The numbers of a row that :func:`summarise` averages."""


def summarise(rows: Sequence[Row]) -> list[Row]:
    """For each smoothing and level: every measure's mean over steps and seeds, and how it differs from ``none``.

    ``<measure>_gap`` is the mean over seeds of the difference to the plain run of the same seed, ``<measure>_error``
    that mean's standard error (NaN for one seed): seeds are the independent units, steps are not.

    Raises:
        MisuseError: there are no rows of plain advantages to compare with.
    """
    seeds = sorted({row["seed"] for row in rows})
    kinds = list(dict.fromkeys((row["smoothing"], row["level"]) for row in rows))
    plain = next((kind for kind in kinds if kind[0] == "none"), None)
    if plain is None:
        raise MisuseError("there are no rows of plain advantages ('none') to compare with")

    def of(kind: tuple[str, float], seed: int, measure: str) -> float:
        found = [
            row[measure]
            for row in rows
            if (row["smoothing"], row["level"], row["seed"]) == (*kind, seed)
            and not math.isnan(row.get(measure, math.nan))
        ]
        return sum(found) / len(found) if found else math.nan

    lines = []
    for kind in kinds:
        line: Row = {"smoothing": kind[0], "level": kind[1], "seeds": len(seeds)}
        for measure in MEASURES:
            values = torch.tensor([of(kind, seed, measure) for seed in seeds], dtype=torch.float64)
            gaps = values - torch.tensor([of(plain, seed, measure) for seed in seeds], dtype=torch.float64)
            line[measure], line[f"{measure}_gap"] = float(values.mean()), float(gaps.mean())
            line[f"{measure}_error"] = float(gaps.std() / math.sqrt(len(seeds))) if len(seeds) > 1 else math.nan
        lines.append(line)
    return lines

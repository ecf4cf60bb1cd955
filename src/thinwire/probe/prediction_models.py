"""Small models that learn from features which weights will change, and how they compare with plain rules.

A model is trained on steps that lie behind and tested on later ones, on another seed or on another task
(:func:`compare`): what it learned of one run is worth something only if it holds in the next.

>>> known = {"a": torch.linspace(-1, 1, 2000), "b": torch.zeros(2000)}
>>> model = fit([(known, known["a"] > 0.5)], names=("a", "b"))
>>> scores = model(known)
>>> bool(scores[-1] > 0.9), bool(scores[0] < 0.1)
(True, True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from thinwire.errors import MisuseError
from thinwire.probe.prediction import FEATURES, PREDICTORS, Features, PredictionScore, score

__all__ = ["Learned", "Model", "Observation", "compare", "fit"]

Model = Literal["logistic", "mlp"]
Observation = tuple[Features, Tensor]
"""What was known before a step, and what it changed: features [S], bool [S]."""

_CLIP = 8.0
"""Standard deviations beyond which a feature says no more."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A trained model: called with features it returns each weight's probability [S] to change."""

    names: tuple[str, ...]
    mean: Tensor
    deviation: Tensor
    network: nn.Module

    @torch.no_grad()
    def __call__(self, known: Features) -> Tensor:
        """Probabilities, float32 [S].

        Raises:
            MisuseError: a feature that it was trained on is missing.
        """
        inputs = _standard(_columns(known, self.names), self.mean, self.deviation)
        found: Tensor = torch.sigmoid(self.network(inputs).flatten())
        return found


def fit(
    observations: Sequence[Observation],
    *,
    model: Model = "logistic",
    names: Sequence[str] = FEATURES,
    seed: int = 0,
    steps: int = 400,
    batch: int = 8192,
) -> Learned:
    """Train on observed steps by cross-entropy: Adam, ``steps`` batches of ``batch`` weights drawn from all of them.

    ``logistic`` is linear in the features, ``mlp`` has two layers of 32. Features are brought to mean 0 and deviation
    1. Equal seeds give equal models; the global random state is left as it was.

    Raises:
        MisuseError: nothing was observed, nothing or everything changed, features are missing or not finite; an
            unknown model.
    """
    if model not in get_args(Model):
        raise MisuseError(f"there is no model {model!r}; use one of {', '.join(get_args(Model))}", model=model)
    if not observations:
        raise MisuseError("there is nothing to learn from: no step was observed")
    inputs = torch.cat([_columns(known, names) for known, _ in observations])
    targets = torch.cat([changed for _, changed in observations]).float()
    if len(inputs) != len(targets) or not bool(torch.isfinite(inputs).all()):
        raise MisuseError(f"{len(inputs)} weights' features and {len(targets)} changes: both of one length, and finite")
    if not 0 < float(targets.mean() if len(targets) else 0.0) < 1:
        raise MisuseError("nothing or everything changed: there is nothing to tell apart")
    mean, deviation = inputs.mean(dim=0), inputs.std(dim=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(model, len(names))
    rate = float(targets.mean())
    with torch.no_grad():
        last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
        last.bias.fill_(torch.logit(torch.tensor(rate)))  # begin at the base rate
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1 if model == "logistic" else 0.005)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        rows = torch.randint(0, len(inputs), (min(batch, len(inputs)),), generator=generator)
        out = network(_standard(inputs[rows], mean, deviation)).flatten()
        loss = nn.functional.binary_cross_entropy_with_logits(out, targets[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return Learned(tuple(names), mean, deviation, network.requires_grad_(False))


def compare(
    train: Sequence[Observation], test: Sequence[Observation], *, seed: int = 0, steps: int = 400
) -> dict[str, tuple[PredictionScore, ...]]:
    """Every rule and both models on each step of ``test``; the models have seen ``train`` only, for ``steps`` batches.

    For transfer, let ``train`` and ``test`` be of two seeds or tasks. Steps that changed nothing are left out.

    Raises:
        MisuseError: as :func:`fit`.
    """
    rules: dict[str, Callable[[Features], Tensor]] = dict(PREDICTORS)
    rules |= {kind: fit(train, model=kind, seed=seed, steps=steps) for kind in get_args(Model)}
    useful = [(known, changed) for known, changed in test if bool(changed.any())]
    return {name: tuple(score(rule(known), changed) for known, changed in useful) for name, rule in rules.items()}


def _network(model: Model, width: int) -> nn.Module:
    if model == "logistic":
        return nn.Linear(width, 1)
    return nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1))


def _columns(known: Features, names: Sequence[str]) -> Tensor:
    """[S, names] float32."""
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise MisuseError(f"features {', '.join(missing) or '(none)'} are missing", missing=missing)
    return torch.stack([known[name].float() for name in names], dim=1)


def _standard(inputs: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return ((inputs - mean) / deviation).clamp(-_CLIP, _CLIP)

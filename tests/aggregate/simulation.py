"""Losses of workers as they look in training: falling, noisy, autocorrelated, with heavy tails; and a small model that
is really trained, for what no formula has in it: a batch that is learnt by heart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thinwire.aggregate import Observation, Reading, SignalWeighted

Array = NDArray[np.float64]


def noise(steps: int, workers: int, seed: int, autocorrelation: float = 0.5, freedom: float = 3.5) -> Array:
    """``[steps, workers]`` of variance 1: Student's t, each step's correlated with the last one's."""
    generator = np.random.default_rng(seed)
    fresh = generator.standard_t(freedom, size=(steps, workers)) / np.sqrt(freedom / (freedom - 2))
    values = np.zeros_like(fresh)
    values[0] = fresh[0]
    for step in range(1, steps):
        values[step] = autocorrelation * values[step - 1] + np.sqrt(1 - autocorrelation**2) * fresh[step]
    return values


def losses(steps: int, workers: int, seed: int, autocorrelation: float = 0.5) -> Array:
    """From 11 to 3.3 in 5,000 steps, most of it in the first few hundred, each with 2 % of noise."""
    step = np.arange(steps)[:, None]
    level = 3 + 6 * np.exp(-step / 150) + 2 * (1 + step / 100) ** -0.5
    return np.asarray(level * (1 + 0.02 * noise(steps, workers, seed, autocorrelation)))


@dataclass
class Followed:
    """All ranks of a run: their signals' states, and the one state that they share."""

    weighting: SignalWeighted
    workers: int
    states: list[Any] = field(init=False)
    shared: Any = field(init=False)

    def __post_init__(self) -> None:
        self.states = [[signal.init() for signal in self.weighting.signals] for _ in range(self.workers)]
        self.shared = self.weighting.init(self.workers)

    def step(self, seen: list[Observation]) -> Tensor:
        signals = self.weighting.signals
        self.states = [
            [signal.update(state, mine) for signal, state in zip(signals, states, strict=True)]
            for states, mine in zip(self.states, seen, strict=True)
        ]
        packed = [Reading.pack([signal.read(s) for signal, s in zip(signals, row, strict=True)]) for row in self.states]
        weights, self.shared = self.weighting.weights([Reading.unpack(each) for each in packed], None, self.shared)
        return weights


def weights_of(values: Array, weighting: SignalWeighted) -> Array:
    """``[steps, workers]``, from losses of that shape."""
    run = Followed(weighting, values.shape[1])
    return np.array([run.step([Observation(loss=float(loss)) for loss in row]).numpy() for row in values])


# --- a model that is trained -----------------------------------------------------------------------------------------

TOKENS = 48
LENGTH = 9


@dataclass(frozen=True)
class Data:
    """What one worker draws in a step: fresh batches of a Markov chain's text from step 0 on, and from ``since`` on:
    batches of which a share ``garbled`` of the tokens is random; or the same ``repeated`` batches over and over; or one
    batch for ``held`` steps, then another."""

    garbled: float = 0.0
    repeated: int = 0
    held: int = 0
    since: int = 0


class Model(nn.Module):
    """The next token from the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 32)
        self.mix = nn.Linear(64, 128)
        self.out = nn.Linear(128, TOKENS)

    def forward(self, text: Tensor) -> Tensor:
        seen = self.embed(text)
        hidden = torch.relu(self.mix(torch.cat([seen[:, 1:-1], seen[:, :-2]], -1)))
        return nn.functional.cross_entropy(self.out(hidden).flatten(0, 1), text[:, 2:].flatten())


def _text(chain: Tensor, generator: torch.Generator, batch: int = 16) -> Tensor:
    text = torch.empty(batch, LENGTH, dtype=torch.long)
    text[:, 0] = torch.randint(TOKENS, (batch,), generator=generator)
    for position in range(1, LENGTH):
        text[:, position] = torch.multinomial(chain[text[:, position - 1]], 1, generator=generator)[:, 0]
    return text


def _batch(data: Data, step: int, chain: Tensor, generator: torch.Generator, fixed: list[Tensor]) -> Tensor:
    fresh = _text(chain, generator)
    if step < data.since:
        return fresh
    if data.repeated:
        return fixed[step % data.repeated]
    if data.held:
        return fixed[step // data.held % len(fixed)]
    garbled = torch.rand(fresh.shape, generator=generator) < data.garbled
    return torch.where(garbled, torch.randint(TOKENS, fresh.shape, generator=generator), fresh)


def train(shards: list[Data], weighting: SignalWeighted, steps: int, adam: bool = True, seed: int = 0) -> Array:
    """Weights ``[steps, workers]`` while a model is trained with them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Model()
    chain = torch.softmax(2.5 * torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(9)), -1)
    generators = [torch.Generator().manual_seed(100 * seed + worker) for worker in range(len(shards))]
    fixed = [[_text(chain, generator) for _ in range(32)] for generator in generators]
    parameters = list(model.parameters())
    optimiser = torch.optim.Adam(parameters, lr=2e-3) if adam else torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    run, found = Followed(weighting, len(shards)), []
    for step in range(steps):
        seen = [
            model(_batch(data, step, chain, generator, batches))
            for data, generator, batches in zip(shards, generators, fixed, strict=True)
        ]
        weights = run.step([Observation(loss=loss.item()) for loss in seen])
        gradients = [torch.autograd.grad(loss, parameters) for loss in seen]
        for parameter, *parts in zip(parameters, *gradients, strict=True):
            parameter.grad = sum(float(weight) * part for weight, part in zip(weights, parts, strict=True))  # type: ignore[assignment]
        optimiser.step()
        found.append(weights.numpy())
    return np.array(found)

"""What a client learns and how well: models, their local steps, and their scores.

==============  =====================================================================  ================================
data            model                                                                  a client's samples
==============  =====================================================================  ================================
``digits``      a small CNN of two convolutions                                        images dealt by :mod:`.partition`
``mnist``       the same                                                               the same
``cifar10``     Flower's niid_bench CNN (LeNet's shape, 62,006 weights)                the same
``plays``       a small GPT over characters                                            one speaker's lines
==============  =====================================================================  ================================

A fifth of every client's samples is held out, for the accuracy that its owner sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from thinwire.errors import MisuseError
from thinwire.lab.federated.partition import by_speaker, partition
from thinwire.lab.vision.data import load_images
from thinwire.lab.vision.models import SimpleCNN

__all__ = ["DATA", "Client", "Federation", "Score", "World", "evaluate", "fairness", "learn", "world_of"]

DATA = ("digits", "mnist", "cifar10", "plays")
_HELD_OUT = 5  # one sample in so many
_CONTEXT = 64
_BATCH = 512


@final
@dataclass(frozen=True, slots=True)
class Federation:
    """Who learns what. ``train`` and ``test`` keep so many samples of the data set (all if None), drawn at random."""

    data: str = "digits"
    clients: int = 10
    partition: str = "dirichlet-0.5"
    seed: int = 0
    train: int | None = None
    test: int | None = None
    root: str | None = None

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise MisuseError(f"there is no data {self.data!r}; give one of {', '.join(DATA)}")
        if self.clients < 1:
            raise MisuseError(f"{self.clients} clients; give 1 or more")


@final
@dataclass(frozen=True, slots=True)
class Client:
    """One client's samples: inputs and targets to learn from, and those held out."""

    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor


@final
@dataclass(frozen=True, slots=True)
class Score:
    """Mean loss in nats, and the share of right answers, over ``count`` targets."""

    loss: float
    accuracy: float
    count: int


@final
@dataclass(frozen=True)
class World:
    """A federation's clients, a test set that none of them has, and how to make its model."""

    clients: tuple[Client, ...]
    test_inputs: Tensor
    test_targets: Tensor
    make: Callable[[], nn.Module]

    def model(self, seed: int) -> nn.Module:
        """The model with weights drawn from ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()


@final
class _NiidCNN(nn.Module):
    """LeNet's shape as in Flower's niid_bench (Li et al. 2021, arXiv:2102.02079): 5 x 5 convolutions of 6 and 16
    channels, then 120, 84 and as many units as classes."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(shape[0], 6, 5), nn.Conv2d(6, 16, 5)
        height, width = (((size - 4) // 2 - 4) // 2 for size in shape[1:])
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * height * width, 120), nn.Linear(120, 84), nn.Linear(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.relu(self.conv1(images)), 2)
        x = functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1)))))
        logits: Tensor = self.fc3(x)
        return logits


@final
class _CharGPT(nn.Module):
    """A GPT whose ``forward`` gives logits ``[B, characters, T]``, as cross-entropy takes them."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        from thinwire.lab.text.model import make_gpt

        self.gpt = make_gpt(characters, context=_CONTEXT, layers=2, width=64)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.gpt(tokens).logits
        return logits.transpose(1, 2)


@lru_cache(maxsize=4)
def world_of(federation: Federation) -> World:
    """The world of a federation; the same one for equal federations, so that it is loaded once.

    Raises:
        MisuseError: the data set is not here, or cannot be dealt to so many clients.
    """
    return _plays(federation) if federation.data == "plays" else _images(federation)


def _images(federation: Federation) -> World:
    images = load_images(federation.data, federation.root)
    source = np.random.default_rng(federation.seed)

    def some(inputs: Tensor, labels: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(source.permutation(len(labels))[:count])
        return (inputs[rows].float() - images.mean) / images.deviation, labels[rows]

    inputs, labels = some(images.train_images, images.train_labels, federation.train)
    test_inputs, test_labels = some(images.test_images, images.test_labels, federation.test)
    shards = partition(labels.numpy(), federation.clients, federation.partition, seed=federation.seed)
    mixed = [torch.from_numpy(source.permutation(shard)) for shard in shards]
    clients = tuple(_client(inputs[shard], labels[shard]) for shard in mixed)
    make: Callable[[], nn.Module] = (
        (lambda: _NiidCNN(images.shape, images.classes))
        if federation.data == "cifar10"
        else (lambda: SimpleCNN(images.shape, images.classes, width=16))
    )
    return World(clients, test_inputs, test_labels, make)


def _client(inputs: Tensor, targets: Tensor) -> Client:
    held = max(1, len(targets) // _HELD_OUT) if len(targets) > 1 else 0
    return Client(inputs[held:], targets[held:], inputs[:held], targets[:held])


def _plays(federation: Federation) -> World:
    from thinwire.lab.text.sources import read_source

    source = read_source("tinyshakespeare", federation.root)
    characters = {c: i for i, c in enumerate(sorted(set(source.train + source.valid)))}

    def windows(text: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([characters[c] for c in text])
        rows = tokens[: (len(tokens) - 1) // _CONTEXT * _CONTEXT].view(-1, _CONTEXT)[:count]
        return rows, tokens[1 : rows.numel() + 1].view(-1, _CONTEXT)

    speeches = by_speaker(source.train, federation.clients)
    clients = tuple(_client(*windows(speech, federation.train)) for speech in speeches)
    test_inputs, test_targets = windows(source.valid, federation.test or 200)
    return World(clients, test_inputs, test_targets, lambda: _CharGPT(len(characters)))


def learn(
    model: nn.Module, client: Client, *, epochs: int, batch: int, lr: float, momentum: float = 0.9, seed: int = 0,
    proximal: float = 0.0,
) -> float:  # fmt: skip
    """Local epochs of SGD; returns the mean loss. ``proximal`` is FedProx's mu (Li et al. 2020, arXiv:1812.06127).

    >>> world = world_of(Federation(clients=2, partition="iid", train=64))
    >>> model = world.model(0)
    >>> first = learn(model, world.clients[0], epochs=1, batch=16, lr=0.05)
    >>> learn(model, world.clients[0], epochs=5, batch=16, lr=0.05) < first
    True
    """
    model.train()
    start = [w.detach().clone() for w in model.parameters()] if proximal else []
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    total, seen = 0.0, 0
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(client.targets), generator=generator), batch):
            loss = functional.cross_entropy(model(client.inputs[rows]), client.targets[rows])
            total, seen = total + float(loss.detach()) * len(rows), seen + len(rows)
            for weight, old in zip(model.parameters(), start, strict=False):  # no start: no penalty
                loss = loss + proximal / 2 * (weight - old).square().sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return total / max(seen, 1)


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> Score:
    """The score on samples; of none, a loss of 0."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for x, y in zip(torch.split(inputs, _BATCH), torch.split(targets, _BATCH), strict=True):
        logits = model(x)
        loss += float(functional.cross_entropy(logits, y, reduction="sum"))
        right += int((logits.argmax(1) == y).sum())
        count += y.numel()
    return Score(loss / max(count, 1), right / max(count, 1), count)


def fairness(model: nn.Module, world: World) -> Mapping[str, Any]:
    """How the clients fare on what each held out: ``mean``, ``worst`` (mean of the worst tenth, one client at least)
    and ``variance`` of their accuracies, and the ``accuracies`` themselves."""
    found = [evaluate(model, c.held_inputs, c.held_targets).accuracy for c in world.clients if len(c.held_targets)]
    ordered = sorted(found)
    worst = ordered[: max(1, len(ordered) // 10)]
    return {
        "mean": float(np.mean(found)), "worst": float(np.mean(worst)), "variance": float(np.var(found)),
        "accuracies": [round(accuracy, 6) for accuracy in found],
    }  # fmt: skip

"""What is learnt: scikit-learn's 8x8 digits, by a small CNN. The data is in the package; nothing is downloaded."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

TEST = 297


def network() -> nn.Module:
    """38,282 weights, the same at every start."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.images[order] / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(data.target[order])


def part(number: int, parts: int) -> tuple[Tensor, Tensor]:
    """One client's share, not like the others': of the images sorted half by class, half by chance, its slice."""
    images, labels = digits()
    images, labels = images[:-TEST], labels[:-TEST]
    key = labels.double() + 5 * torch.rand(len(labels), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = key.argsort().tensor_split(parts)[number]
    return images[mine], labels[mine]


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, rate: float, seed: int) -> float:
    """Mean loss of local SGD."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    total = 0.0
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(16):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(batch)
    return total / (epochs * len(images))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the images that no client has."""
    images, labels = digits()
    model.eval()
    return float((model(images[-TEST:]).argmax(1) == labels[-TEST:]).float().mean())

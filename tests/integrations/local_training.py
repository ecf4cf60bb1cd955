"""A model and a worker that trains it by local steps, for tests."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.compress import BlockTopK, Compressor, ErrorFeedback, Int8, LowRank, Quantize, TopK
from thinwire.compress.group import Group
from thinwire.compress.sparsify import Sparsifier
from thinwire.compress.visible import VisibleTopK
from thinwire.integrations.ddp import CompressedAllReduce
from thinwire.integrations.local_steps import LocalSteps

STEPS = 12


class Net(nn.Module):
    """Tied weights, a frozen layer, buffers, a parameter that gets no gradient, and one without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.norm = nn.BatchNorm1d(16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, 16)
        self.third.weight = self.second.weight
        self.unused = nn.Parameter(torch.ones(5))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        hidden = torch.tanh(self.second(hidden)) + self.frozen(hidden)
        return (self.third(hidden) * self.scale).square().mean()


with torch.random.fork_rng():
    torch.manual_seed(0)
    START = Net()  # made once: torch's random state is common to all threads


def make(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Net:
    return copy.deepcopy(START).to(device, dtype)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)


class Worker:
    """One rank's training run."""

    def __init__(
        self,
        group: Group | None,
        compressor: Compressor | None = None,
        *,
        optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        mode: Any = None,
        **options: Any,
    ) -> None:
        self.rank = group.rank if group else torch.distributed.get_rank()
        self.model = make(dtype, device)
        self.dtype, self.device = dtype, device
        self.optimizer = optimizer(self.model.parameters())
        sparse = isinstance(getattr(compressor, "compressor", compressor), Sparsifier)
        mode = mode or ("split" if sparse else "auto")  # auto follows how busy the machine is
        self.exchange = CompressedAllReduce(compressor, group=group, mode=mode)
        self.outer = LocalSteps(self.model, self.optimizer, self.exchange, **{"every": 3, **options})

    def inner(self, step: int) -> None:
        generator = torch.Generator().manual_seed(1000 * self.rank + step)
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 12, generator=generator).to(self.device, self.dtype)).backward()
        self.optimizer.step()

    def train(self, steps: range = range(STEPS)) -> Worker:
        for step in steps:
            self.inner(step)
            self.outer.step()
        return self

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def waiting(self) -> dict[str, Tensor]:
        return {k: v["residual"].double() for k, v in self.exchange.state_dict()["parameters"].items()}

    def save(self) -> dict[str, Any]:
        file = io.BytesIO()
        state = {"outer": self.outer, "model": self.model, "optimizer": self.optimizer, "exchange": self.exchange}
        torch.save({name: part.state_dict() for name, part in state.items()}, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        return loaded

    def load(self, state: dict[str, Any]) -> Worker:
        for name, part in state.items():
            owner = self.outer if name == "outer" else getattr(self, name)
            owner.load_state_dict(part)
        return self


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(first.values(), second.values(), strict=True)
    )


COMPRESSORS: dict[str, tuple[Compressor, str]] = {
    "split": (ErrorFeedback(TopK(0.05)), "split"),
    "gather bf16": (ErrorFeedback(TopK(0.05, "bfloat16")), "gather"),
    "shared": (ErrorFeedback(TopK(0.05)), "shared"),
    "blocks": (ErrorFeedback(BlockTopK(0.1, block=8)), "split"),
    "int8": (ErrorFeedback(Quantize(Int8())), "auto"),
    "low rank": (ErrorFeedback(LowRank(2)), "auto"),
    "visible": (ErrorFeedback(VisibleTopK()), "split"),
    "visible, capped": (ErrorFeedback(VisibleTopK(0.05)), "gather"),
}

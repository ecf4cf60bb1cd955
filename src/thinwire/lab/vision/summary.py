"""What came of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from thinwire.sync.encode import take_snapshot
from thinwire.sync.layout import StateSource
from thinwire.tensors.tree import state_of

__all__ = ["Epoch", "Summary", "weights_digest"]


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch: losses are means per sample, ``accuracy`` a share, ``samples_per_s`` of all workers while they
    learnt (the evaluation is not counted)."""

    epoch: int
    step: int
    train_loss: float
    test_loss: float
    accuracy: float
    seconds: float
    samples_per_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A run's result. ``bytes_*`` are one worker's gradient payload over the whole run; ``digest`` is that of the final
    weights and buffers, as ``thinwire inspect --digest`` tells it. ``finished`` is False after ``stop_after``."""

    config: dict[str, Any]
    workers: int
    device: str
    parameters: int
    steps: int
    finished: bool
    history: tuple[Epoch, ...]
    bytes_received: int
    bytes_sent: int
    bytes_dense: int
    seconds: float
    digest: str

    @property
    def accuracy(self) -> float | None:
        """Of the last epoch; None before the first has ended."""
        return self.history[-1].accuracy if self.history else None

    @property
    def best_accuracy(self) -> float | None:
        """The highest of all epochs."""
        return max((row.accuracy for row in self.history), default=None)

    @property
    def saved(self) -> float:
        """Share of the bytes of an uncompressed run that were not received."""
        return 1 - self.bytes_received / self.bytes_dense if self.bytes_dense else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON document."""
        derived = {"accuracy": self.accuracy, "best_accuracy": self.best_accuracy, "saved": self.saved}
        return derived | asdict(self)


def weights_digest(model: nn.Module) -> str:
    """Digest of all parameters and buffers as they lie in memory."""
    return take_snapshot(
        StateSource(state_of({k: v.cpu() for k, v in model.state_dict().items()})), threads=1
    ).tree.digest

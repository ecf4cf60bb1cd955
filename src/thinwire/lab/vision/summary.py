"""What came of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from thinwire.lab.trainer.outcome import Outcome

__all__ = ["Epoch", "Summary"]


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


@dataclass(frozen=True, kw_only=True)
class Summary(Outcome):
    """A run's result: what :class:`~thinwire.lab.trainer.outcome.Outcome` tells of any, and each epoch's accuracy."""

    history: tuple[Epoch, ...]

    @property
    def accuracy(self) -> float | None:
        """Of the last epoch; None before the first has ended."""
        return self.history[-1].accuracy if self.history else None

    @property
    def best_accuracy(self) -> float | None:
        """The highest of all epochs."""
        return max((row.accuracy for row in self.history), default=None)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON document."""
        derived = {"accuracy": self.accuracy, "best_accuracy": self.best_accuracy, "saved": self.saved}
        return derived | asdict(self)

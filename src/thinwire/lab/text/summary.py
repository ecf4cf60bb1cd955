"""What came of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from thinwire.lab.trainer.outcome import Outcome

__all__ = ["Report", "Summary"]


@dataclass(frozen=True, slots=True)
class Report:
    """One validation: losses are means in nats a token (``train_loss`` since the last one, as the workers saw it),
    ``tokens_per_s`` those of all workers while they learnt."""

    epoch: int
    step: int
    train_loss: float
    valid_loss: float
    perplexity: float
    seconds: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class Summary(Outcome):
    """A run's result: what :class:`~thinwire.lab.trainer.outcome.Outcome` tells of any, each validation, and what the
    model writes. ``entropy`` is the loss below which no model can get, where that is known; ``corrupted`` are the ranks
    of spoilt workers."""

    history: tuple[Report, ...]
    vocabulary: int
    entropy: float | None
    corrupted: tuple[int, ...]
    sample: str

    @property
    def loss(self) -> float | None:
        """The last validation's; None before the first."""
        return self.history[-1].valid_loss if self.history else None

    @property
    def perplexity(self) -> float | None:
        """The last validation's."""
        return self.history[-1].perplexity if self.history else None

    @property
    def best_loss(self) -> float | None:
        """The lowest of all validations."""
        return min((row.valid_loss for row in self.history), default=None)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON document."""
        derived = {"loss": self.loss, "perplexity": self.perplexity, "best_loss": self.best_loss, "saved": self.saved}
        return derived | asdict(self)

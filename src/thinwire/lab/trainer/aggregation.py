"""How the workers' gradients become one: what ``--aggregate`` and ``--signal`` stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinwire.errors import MisuseError
from thinwire.integrations.ddp import CompressedAllReduce
from thinwire.lab.trainer.options import TrainingOptions

__all__ = ["Standing", "make_aggregate", "standing"]


def make_aggregate(options: TrainingOptions) -> object | None:
    """What ``CompressedAllReduce(aggregate=...)`` takes; None is the mean of all workers.

    Raises:
        MisuseError: there is no such way to aggregate.

    >>> from thinwire.lab.trainer.options import TrainingOptions
    >>> make_aggregate(TrainingOptions()) is None
    True
    """
    if options.aggregate == "uniform":
        return None
    raise MisuseError(
        f"there is no aggregate {options.aggregate!r} here; give uniform, the mean of all workers",
        aggregate=options.aggregate,
    )


@dataclass(frozen=True, slots=True)
class Standing:
    """How the workers stand with the exchange in one step, by rank: what each counts for, and what its signals say."""

    weights: Sequence[float]
    signals: Sequence[Mapping[str, float]]


def standing(exchange: CompressedAllReduce | None, size: int) -> Standing:
    """The standing of ``size`` workers after a step. Without an aggregate all count the same.

    >>> standing(None, 2)
    Standing(weights=[0.5, 0.5], signals=[{}, {}])
    """
    weights = getattr(exchange, "weights", None)
    readings = getattr(exchange, "readings", None) or [{}] * size
    return Standing(
        [1 / size] * size if weights is None else [float(x) for x in weights[:size]],
        [{name: float(x.value) for name, x in row.items() if x.valid} for row in readings],
    )

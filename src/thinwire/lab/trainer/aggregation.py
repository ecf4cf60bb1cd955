"""How the workers' gradients become one: what ``--aggregate`` and ``--signal`` stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinwire.aggregate import AGGREGATORS, SIGNALS, Aggregator, Signal, SignalWeighted, Weighting
from thinwire.errors import MisuseError
from thinwire.integrations.ddp import CompressedAllReduce
from thinwire.lab.trainer.options import TrainingOptions

__all__ = ["Standing", "make_aggregate", "standing"]

_OBSERVED = {"loss", "tokens", "norm2", "dot_previous", "previous_norm2", "agreement"}
"""Fields of an observation: what recipes say, and what is read off the gradients."""


def make_aggregate(options: TrainingOptions) -> Weighting | Aggregator | None:
    """What ``CompressedAllReduce(aggregate=...)`` takes; None is the mean of all workers.

    Raises:
        MisuseError: there is no such signal, or it needs what a recipe does not observe.

    >>> from thinwire.lab.trainer.options import TrainingOptions
    >>> make_aggregate(TrainingOptions()) is None
    True
    >>> make_aggregate(TrainingOptions(aggregate="trimmed_mean", faulty=2))
    TrimmedMean(trim=2)
    """
    if options.aggregate == "uniform":
        return None
    if options.aggregate == "signal":
        return SignalWeighted(tuple(_signal(name.strip()) for name in options.signal.split(",")))
    counts = {"trimmed_mean": "trim", "krum": "faulty", "multi_krum": "faulty"}
    given = {counts[options.aggregate]: options.faulty} if options.aggregate in counts else {}
    return AGGREGATORS[options.aggregate](**given)


def _signal(name: str) -> Signal:
    if name not in SIGNALS:
        raise MisuseError(f"there is no signal {name!r}; give some of {', '.join(SIGNALS)}", signal=name)
    made = SIGNALS[name]()
    if not made.needs <= _OBSERVED:
        raise MisuseError(
            f"the signal {name} needs {', '.join(sorted(made.needs - _OBSERVED))}, which this recipe does not observe; "
            "a loop of your own can, by exchange.observe() and exchange.refer_to()",
            signal=name,
        )
    return made


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

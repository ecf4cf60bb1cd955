"""Many workers' updates into one: weighted by signals of quality, or robustly."""

from thinwire.aggregate.base import (
    Aggregator,
    Coordinatewise,
    Linear,
    Observation,
    Reading,
    Signal,
    aggregate,
    finite_workers,
    gram_matrix,
    weighted_sum,
)
from thinwire.aggregate.coordinatewise import CoordinateMedian, TrimmedMean
from thinwire.aggregate.linear import (
    AdaCons,
    AdaSum,
    CentredClipping,
    Krum,
    Mean,
    MultiKrum,
    OutlierSkip,
    Weighted,
)
from thinwire.aggregate.signals import (
    SIGNALS,
    Agreement,
    CosineToPrevious,
    CosineToReference,
    GradientNormStability,
    HeldOutImprovement,
    LossEMA,
)
from thinwire.aggregate.weights import SignalWeighted, Uniform, Weighting

__all__ = [
    "AGGREGATORS",
    "SIGNALS",
    "AdaCons",
    "AdaSum",
    "Aggregator",
    "Agreement",
    "CentredClipping",
    "CoordinateMedian",
    "Coordinatewise",
    "CosineToPrevious",
    "CosineToReference",
    "GradientNormStability",
    "HeldOutImprovement",
    "Krum",
    "Linear",
    "LossEMA",
    "Mean",
    "MultiKrum",
    "Observation",
    "OutlierSkip",
    "Reading",
    "Signal",
    "SignalWeighted",
    "TrimmedMean",
    "Uniform",
    "Weighted",
    "Weighting",
    "aggregate",
    "finite_workers",
    "gram_matrix",
    "weighted_sum",
]

_TABLE: tuple[type[Aggregator], ...] = (
    Mean,
    Weighted,
    AdaCons,
    AdaSum,
    Krum,
    MultiKrum,
    CentredClipping,
    OutlierSkip,
    CoordinateMedian,
    TrimmedMean,
)

AGGREGATORS: dict[str, type[Aggregator]] = {aggregator.name: aggregator for aggregator in _TABLE}
"""By name: a new aggregator is a class and a row."""

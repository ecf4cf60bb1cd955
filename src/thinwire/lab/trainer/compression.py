"""From options to a compressor: what ``--compress`` and its neighbours stand for."""

from __future__ import annotations

from collections.abc import Callable

from thinwire.compress.base import Compressor
from thinwire.compress.feedback import ErrorFeedback
from thinwire.compress.lowrank import LowRank
from thinwire.compress.quantize import QSGD, Float8, Int8, Quantize, Sign
from thinwire.compress.schedule import Schedule, Warmup
from thinwire.compress.sparsify import BlockTopK, RandomK, Threshold, TopK
from thinwire.compress.values import ValueCodec
from thinwire.lab.trainer.options import TrainingOptions

__all__ = ["compressor_of", "schedule_of"]

_SPARSE: dict[str, Callable[[TrainingOptions], Compressor]] = {
    "topk": lambda x: TopK(x.density, x.values),
    "threshold": lambda x: Threshold(x.density, x.values),
    "randomk": lambda x: RandomK(x.density, x.values, seed=x.seed),
    "blocktopk": lambda x: BlockTopK(x.density, x.values, block=x.block),
}
_DENSE: dict[str, ValueCodec] = {"sign": Sign(), "qsgd": QSGD(), "int8": Int8(), "fp8": Float8()}


def compressor_of(options: TrainingOptions) -> Compressor | None:
    """The compressor asked for, within error feedback unless that is off; None for ``none``.

    >>> from thinwire.lab.trainer.options import TrainingOptions
    >>> compressor_of(TrainingOptions(compress="powersgd", rank=2))
    ErrorFeedback(compressor=LowRank(rank=2, seed=0), momentum=0.0, masking=True)
    >>> compressor_of(TrainingOptions(compress="none")) is None
    True
    """
    if options.compress == "none":
        return None
    compressor: Compressor
    if options.compress in _SPARSE:
        compressor = _SPARSE[options.compress](options)
    elif options.compress in _DENSE:
        compressor = Quantize(_DENSE[options.compress])
    else:
        compressor = LowRank(options.rank)
    return ErrorFeedback(compressor, options.feedback_momentum) if options.error_feedback else compressor


def schedule_of(options: TrainingOptions) -> Schedule | None:
    """The fall of the density from 25 % in the first ``density_warmup_steps``; None where the density is constant."""
    if options.compress not in _SPARSE or not options.density_warmup_steps:
        return None
    return Warmup(start=max(0.25, options.density), end=options.density, steps=options.density_warmup_steps)

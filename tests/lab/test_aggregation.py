"""The recipes' option --aggregate knows what there is."""

from __future__ import annotations

import pytest

from thinwire.aggregate import AGGREGATORS, SIGNALS, SignalWeighted
from thinwire.errors import MisuseError
from thinwire.lab.trainer.aggregation import make_aggregate
from thinwire.lab.trainer.options import AGGREGATES, TrainingOptions


def test_every_aggregator_is_an_option() -> None:
    assert set(AGGREGATES) == {"uniform", "signal", *AGGREGATORS} - {"mean", "weighted"}
    for name in AGGREGATES[2:]:
        made = make_aggregate(TrainingOptions(aggregate=name, faulty=2))
        assert isinstance(made, AGGREGATORS[name])
        assert not hasattr(made, "faulty") or made.faulty == 2


def test_several_signals_are_one_weighting() -> None:
    made = make_aggregate(TrainingOptions(aggregate="signal", signal="loss_ema, agreement"))
    assert isinstance(made, SignalWeighted)
    assert [signal.name for signal in made.signals] == ["loss_ema", "agreement"]


@pytest.mark.parametrize("name", [name for name, signal in SIGNALS.items() if signal.needs & {"improvement"}])
def test_a_signal_that_nobody_feeds_is_refused(name: str) -> None:
    with pytest.raises(MisuseError, match="observe"):
        make_aggregate(TrainingOptions(aggregate="signal", signal=name))


def test_an_unknown_signal_says_what_there_is() -> None:
    with pytest.raises(MisuseError, match="loss_ema"):
        make_aggregate(TrainingOptions(aggregate="signal", signal="loss"))

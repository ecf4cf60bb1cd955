"""Optimisers that step few cells: time and memory follow the active ones, not all."""

from thinwire.optim.aspg import ASPG
from thinwire.optim.momentum_guided import MomentumGuided
from thinwire.optim.predictive import PredictiveBackward
from thinwire.optim.rows import RowAdamW
from thinwire.optim.schedules import CosineDensity, PlateauDensity

__all__ = ["ASPG", "CosineDensity", "MomentumGuided", "PlateauDensity", "PredictiveBackward", "RowAdamW"]

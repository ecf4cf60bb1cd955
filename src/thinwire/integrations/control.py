"""What an exchange decides anew from step to step, alike on all ranks: how much is sent, and of which parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from thinwire.compress.budget import allocate
from thinwire.compress.group import Group
from thinwire.compress.schedule import Schedule, Signals
from thinwire.compress.sparsify import Sparsifier
from thinwire.errors import MisuseError
from thinwire.integrations.reduction import Reduction
from thinwire.integrations.units import Unit

__all__ = ["Control", "LayerBudget"]


@final
@dataclass(frozen=True)
class LayerBudget:
    """Shares the elements due over all parameters, anew every ``every`` steps (:mod:`thinwire.compress.budget`): by
    their share of the squared gradient norm, or by their ``sensitivity``, the sum of ``|weight * gradient|``.
    Parameters of fewer than ``whole_below`` elements are sent whole."""

    every: int = 50
    score: Literal["gradient_norm", "sensitivity"] = "gradient_norm"
    minimum: int = 1
    maximum_density: float = 1.0
    whole_below: int = 0


@final
class Control:
    """The density by a schedule, and every parameter's share by a budget; both follow what all ranks have seen."""

    def __init__(
        self, reduction: Reduction, group: Group, schedule: Schedule | None, layer_budget: LayerBudget | None
    ) -> None:
        if layer_budget and not (isinstance(reduction.compressor, Sparsifier) and reduction.compressor.by_parameter):
            raise MisuseError(f"{reduction.compressor!r} does not select by parameter; a layer budget needs TopK")
        self.base = reduction.compressor
        self.reduction = reduction
        self.group = group
        self.schedule = schedule
        self.layer_budget = layer_budget
        self.step = 0
        self._schedule_state = schedule.init() if schedule else {}
        self._counts: dict[str, int] = {}
        self._scores: dict[str, float] = {}
        self._numels: dict[str, int] = {}
        self._losses: list[float] = []
        self._norm2 = 0.0
        self._set_density()

    # --- during a step ---------------------------------------------------------------------------------------------

    def observe(self, loss: float) -> None:
        self._losses.append(loss)

    @property
    def scoring(self) -> bool:
        """Whether parameters are scored in this step."""
        return self.layer_budget is not None and self.step % self.layer_budget.every == 0

    def apply_counts(self, unit: Unit) -> None:
        """Tells the unit's compressor how many elements of each parameter are due, once that is known."""
        if self._counts and self._counts.keys() >= set(unit.keys):
            unit.inner = {**unit.inner, "counts": [self._counts[key] for key in unit.keys]}

    def take_scores(self, unit: Unit) -> None:
        if unit.scores:
            self._scores.update(zip(unit.keys, unit.scores, strict=True))
            self._numels.update(zip(unit.keys, unit.layout.numels, strict=True))
            unit.scores = ()

    def saw(self, mean: Tensor) -> None:
        """Values of the mean update that were applied."""
        if self.schedule:
            self._norm2 += float(mean.double().square().sum())

    # --- between steps ---------------------------------------------------------------------------------------------

    def end_step(self, *, good: bool) -> None:
        """Collective where there is a schedule or a budget. A step that was undone teaches nothing."""
        if good:
            self._follow()
        self.step += 1
        self._norm2 = 0.0
        self._losses.clear()

    def _follow(self) -> None:
        if self.schedule:
            mean = sum(self._losses) / len(self._losses) if self._losses else 0.0
            totals = torch.tensor([mean, float(bool(self._losses))])
            self.group.all_reduce_(totals)
            loss = float(totals[0] / totals[1]) if totals[1] else None
            signals = Signals(self.step, loss, self._norm2**0.5)
            self._schedule_state = self.schedule.observe(self._schedule_state, signals)
            self._set_density()
        if self._scores:
            self._share_out()

    def _set_density(self) -> None:
        if self.schedule and self.base is not None:
            self.reduction.compressor = self.base.at(self.schedule.density(self._schedule_state))

    def _share_out(self) -> None:
        """New counts for every parameter, from the mean of all ranks' scores."""
        assert self.layer_budget
        assert isinstance(self.reduction.compressor, Sparsifier)
        scores = torch.tensor(list(self._scores.values()))
        self.group.all_reduce_(scores)
        numels = [self._numels[key] for key in self._scores]
        counts = allocate(
            self.reduction.compressor.count(sum(numels)),
            scores.nan_to_num(0.0, 0.0, 0.0).tolist(),
            numels,
            minimum=self.layer_budget.minimum,
            maximum_density=self.layer_budget.maximum_density,
            whole_below=self.layer_budget.whole_below,
        )
        self._counts = dict(zip(self._scores, counts, strict=True))
        self._scores = {}

    # --- saving ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "schedule": self._schedule_state, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._schedule_state, self._counts, self.step = state["schedule"], dict(state["counts"]), int(state["step"])
        self._set_density()

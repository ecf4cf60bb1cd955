"""One unit's reduction: add the residual, select, and take the way that the mode or the cost model says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, final

import torch
from torch import Tensor

from thinwire.compress import allreduce
from thinwire.compress.allreduce import Reduced
from thinwire.compress.base import Compressor
from thinwire.compress.budget import gradient_norm_share, sensitivity
from thinwire.compress.cost import CostModel, Way, calibrate, quickest
from thinwire.compress.feedback import ErrorFeedback
from thinwire.compress.group import Group
from thinwire.compress.lowrank import LowRank
from thinwire.compress.quantize import Quantize
from thinwire.compress.sparsify import Sparsifier, add_scaled, all_finite
from thinwire.integrations.units import Unit

__all__ = ["MODES", "Mode", "Reduction"]

Mode = Literal["auto", "split", "gather", "shared", "mask", "dense"]
MODES = ("auto", "split", "gather", "shared", "mask", "dense")
MASK_EVERY = 16
"""Exchanges for which a mask serves; in every 16th its positions are found anew, by ``split``."""


@final
class Reduction:
    """Carries units over a group by one compressor. ``compressor`` may be exchanged between steps (for another
    density); ``model`` is the calibrated cost model, once it has been needed."""

    def __init__(
        self,
        compressor: Compressor | None,
        feedback: ErrorFeedback | None,
        group: Group,
        mode: Mode,
        learning_rate_of: Callable[[str], float] | None,
        weight_of: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.compressor = compressor
        self.feedback = feedback
        self.group = group
        self.mode = mode
        self.learning_rate_of = learning_rate_of
        self.weight_of = weight_of
        self.model: CostModel | None = None
        self._scale = 1.0
        self._score = False

    def reduce(self, update: Tensor, unit: Unit, scale: float = 1.0, score: bool = False) -> Reduced | None:
        """The mean of ``update`` (float32 ``[numel]``, ``scale`` times too large) over the ranks, in true units.

        The unit's residual is left as ``update + residual``: whoever applies the result settles the credits. With
        ``score``, ``unit.scores`` is set to what every parameter has a claim on (norm or sensitivity). None: some
        rank's update is not finite.
        """
        self._scale, self._score = scale, score
        if isinstance(self.compressor, Sparsifier):
            return self._sparse(update, unit, self.compressor)
        compensated, finite = self._compensate(update, unit)
        if isinstance(self.compressor, Quantize) and self.mode != "dense":
            reduced, unit.carry = allreduce.dense(
                compensated, finite=finite, codec=self.compressor.codec, group=self.group, carry=unit.carry
            )
        elif isinstance(self.compressor, LowRank) and self.mode != "dense":
            reduced, unit.inner = allreduce.low_rank(
                compensated, finite=finite, compressor=self.compressor, group=self.group, state=unit.inner
            )
        else:
            reduced = allreduce.plain(compensated, self.group)
        return reduced

    def _sparse(self, update: Tensor, unit: Unit, compressor: Sparsifier) -> Reduced | None:
        way = self._way(unit, compressor)
        masked = self.mode == "mask" and way == "shared"
        state = unit.inner
        if way == "dense" or masked or (way == "shared" and not compressor.synchronised and not self._leads(unit)):
            compensated, finite = self._compensate(update, unit)
            positions = unit.mask if masked else None
            if way == "dense":
                return allreduce.plain(compensated, self.group)
        else:
            compensated, positions, finite, state = self._select(update, unit, compressor)
        if self._score:
            unit.scores = self._scores(compensated, unit)
        reduced = self._exchange(way, compensated, positions, finite, compressor, unit)
        if reduced is not None and self.mode == "mask":
            unit.mask = reduced.positions
        if reduced is not None:  # else all ranks keep the state they had, whether or not theirs was the fault
            unit.inner = state
        return reduced

    def _exchange(
        self,
        way: Way,
        compensated: Tensor,
        positions: Tensor | None,
        finite: bool,
        compressor: Sparsifier,
        unit: Unit,
    ) -> Reduced | None:
        if way == "shared":
            reduced, unit.carry = allreduce.shared(
                compensated, positions, finite=finite, compressor=compressor, group=self.group, carry=unit.carry,
                known=compressor.synchronised or self.mode == "mask",
            )  # fmt: skip
            return reduced
        assert positions is not None
        if way == "gather":
            reduced, unit.carry = allreduce.gather(
                compensated, positions, finite=finite, compressor=compressor, group=self.group, carry=unit.carry
            )
            return reduced
        counts = unit.inner.get("counts")
        reduced, unit.carry = allreduce.split(
            compensated, positions, finite=finite, compressor=compressor, group=self.group, carry=unit.carry,
            keep=sum(counts) if counts else compressor.count(compensated.numel()),
            importance=_importance(unit, compensated.device), offsets=unit.layout.offsets,
        )  # fmt: skip
        return reduced

    def _scores(self, compensated: Tensor, unit: Unit) -> tuple[float, ...]:
        if self.weight_of is not None:
            weights = torch.cat([self.weight_of(key).detach().reshape(-1).float() for key in unit.keys])
            total = float((weights.double() * compensated.double()).abs().sum())
            return tuple(total * share for share in sensitivity(weights, compensated, unit.layout))
        total = float(compensated.double().square().sum())
        return tuple(total * share for share in gradient_norm_share(compensated, unit.layout))

    def _leads(self, unit: Unit) -> bool:
        return unit.carry.step % self.group.size == self.group.rank

    def _way(self, unit: Unit, compressor: Sparsifier) -> Way:
        if self.mode == "mask":
            return "split" if unit.mask is None or unit.carry.step % MASK_EVERY == 0 else "shared"
        if self.mode != "auto":
            return self.mode
        if compressor.synchronised:
            return "shared"
        if self.model is None:
            self.model = calibrate(self.group, "cpu")
        n, count = unit.layout.numel, compressor.count(unit.layout.numel)
        value_bytes = compressor.codec.size(1024) / 1024
        entry_bytes = compressor.packed_size(count, n) / max(1, count) + value_bytes
        return quickest(self.model, ("dense", "split", "gather"), n, count, self.group.size, entry_bytes, value_bytes)

    # --- residual and selection ------------------------------------------------------------------------------------

    def _prepare(self, update: Tensor, unit: Unit) -> tuple[Tensor, float, float]:
        """The update in true units (velocity included), and the two scales still to be applied to it and to the
        residual."""
        scale, keep = 1.0 / self._scale, self._learning_rate_ratio(unit)
        if self.feedback and self.feedback.momentum:
            assert unit.velocity is not None
            velocity = unit.target("velocity")
            add_scaled(update, unit.velocity, scale, self.feedback.momentum, velocity)
            unit.velocity = velocity
            return velocity, 1.0, keep
        return update, scale, keep

    def _compensate(self, update: Tensor, unit: Unit) -> tuple[Tensor, bool]:
        if unit.residual is None:
            compensated = update if self._scale == 1.0 else update / self._scale
        else:
            update, scale, keep = self._prepare(update, unit)
            compensated = unit.target("residual")
            add_scaled(update, unit.residual, scale, keep, compensated)
            unit.residual = compensated
        return compensated, all_finite(compensated)

    def _select(
        self, update: Tensor, unit: Unit, compressor: Sparsifier
    ) -> tuple[Tensor, Tensor, bool, dict[str, Any]]:
        if unit.residual is None:
            compensated = update if self._scale == 1.0 else update / self._scale
            positions, state = compressor.select(compensated, unit.inner)
            finite = compressor.finite(compensated, positions)
        else:
            update, scale, keep = self._prepare(update, unit)
            compensated = unit.target("residual")
            positions, finite, state = compressor.accumulate(
                update, unit.residual, unit.inner, update_scale=scale, residual_scale=keep, out=compensated
            )
            unit.residual = compensated
        return compensated, positions, finite, state

    def _learning_rate_ratio(self, unit: Unit) -> float:
        """What waits in the residual was to be applied at the rate of its time; a change of rate is made up for.

        Where parameters of a unit follow different schedules, their parts of the residual are scaled on the spot.
        """
        if self.learning_rate_of is None:
            return 1.0
        rates = tuple(self.learning_rate_of(key) for key in unit.keys)
        before, unit.learning_rates = unit.learning_rates or rates, rates
        ratios = [old / new if old > 0 and new > 0 else 1.0 for old, new in zip(before, rates, strict=True)]
        if len(set(ratios)) == 1:
            return ratios[0]
        assert unit.residual is not None
        if unit.undo:
            unit.residual = unit.target("residual").copy_(unit.residual)
        for ratio, piece in zip(ratios, torch.split(unit.residual, list(unit.layout.numels)), strict=True):
            piece.mul_(ratio)
        return 1.0


def _importance(unit: Unit, device: torch.device) -> Tensor | None:
    """Where each parameter has its own count, magnitudes compete relative to their parameter's threshold."""
    thresholds = unit.inner.get("hints")
    if unit.inner.get("counts") is None or not thresholds:
        return None
    inverse = [1.0 / t if 0 < t < float("inf") else 1.0 for t in thresholds]
    return torch.tensor(inverse, dtype=torch.float32, device=device)

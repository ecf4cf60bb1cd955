"""The reduction of units in two halves: add the residual and select, as each comes; then exchange them together, the
way that the mode or the cost model says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from thinwire.compress import allreduce
from thinwire.compress.allreduce import Carry, Reduced
from thinwire.compress.base import Compressor
from thinwire.compress.budget import gradient_norm_share, sensitivity
from thinwire.compress.cost import CostModel, Way, calibrate, quickest
from thinwire.compress.feedback import ErrorFeedback
from thinwire.compress.group import Group
from thinwire.compress.lowrank import LowRank
from thinwire.compress.quantize import Quantize
from thinwire.compress.sparsify import Sparsifier, add_scaled, all_finite
from thinwire.integrations.joint import Joint, Taken
from thinwire.integrations.units import Unit

__all__ = ["MODES", "Mode", "Reduction"]

Mode = Literal["auto", "split", "gather", "shared", "mask", "dense"]
MODES = ("auto", "split", "gather", "shared", "mask", "dense")
MASK_EVERY = 16
"""Exchanges for which a mask serves; in every 16th its positions are found anew, by ``split``."""

WAYS: tuple[Way, ...] = ("dense", "split", "gather", "shared")

Company = tuple[tuple[str, ...], ...]
"""The keys of the units that travel together."""


@final
class Reduction:
    """Carries units over a group by one compressor. ``compressor`` may be exchanged between steps (for another
    density); ``model`` is the calibrated cost model, once it has been needed; ``carries`` is what the ranks agree on
    from one step to the next."""

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
        self.carries: dict[Company, Carry] = {}
        self._scale = 1.0
        self._step = 0

    def take(self, update: Tensor, unit: Unit, *, scale: float = 1.0, step: int = 0, score: bool = False) -> Taken:
        """First half: adds ``update`` (float32 ``[numel]``, ``scale`` times too large) to the unit's residual and
        selects from it. Nothing is sent. With ``score``, ``unit.scores`` is set to what every parameter has a claim on.
        """
        self._scale, self._step = scale, step
        if not isinstance(self.compressor, Sparsifier):
            compensated, finite = self._compensate(update, unit)
            return Taken(unit, compensated, None, finite, unit.inner, "dense")
        way = self._way(unit, self.compressor)
        masked = self.mode == "mask" and way == "shared"
        if way == "dense" or masked or (way == "shared" and not self.compressor.synchronised and not self._leads):
            compensated, finite = self._compensate(update, unit)
            taken = Taken(unit, compensated, unit.mask if masked else None, finite, unit.inner, way)
        else:
            compensated, positions, finite, state = self._select(update, unit, self.compressor)
            taken = Taken(unit, compensated, positions, finite, state, way)
        if score:
            unit.scores = self._scores(compensated, unit)
        return taken

    def exchange(self, taken: Sequence[Taken]) -> list[Reduced | None]:
        """Second half, collective: the means of units that were taken, in true units; sparse ones travel together.

        The units' residuals still hold what was sent: whoever applies the result settles the credits. None where some
        rank's update of a unit, or of one that travelled with it, is not finite.
        """
        results: dict[int, Reduced | None] = {}
        for way in WAYS:
            alike = [i for i, one in enumerate(taken) if one.way == way]
            if way == "dense":
                results.update((i, self._dense(taken[i])) for i in alike)
                continue
            runs = isinstance(self.compressor, Sparsifier) and self.compressor.run > 1
            for together in [[i] for i in alike] if runs else [alike]:  # a unit may end within a run
                if together:
                    results.update(zip(together, self._sparse(way, [taken[i] for i in together]), strict=True))
        return [results[i] for i in range(len(taken))]

    def _dense(self, taken: Taken) -> Reduced | None:
        unit, compensated = taken.unit, taken.compensated
        if isinstance(self.compressor, Quantize) and self.mode != "dense":
            keys = (unit.keys,)
            reduced, self.carries[keys] = allreduce.dense(
                compensated, finite=taken.finite, codec=self.compressor.codec, group=self.group, carry=self._carry(keys)
            )
            return reduced
        if isinstance(self.compressor, LowRank) and self.mode != "dense":
            reduced, unit.inner = allreduce.low_rank(
                compensated, finite=taken.finite, compressor=self.compressor, group=self.group, state=unit.inner
            )
            return reduced
        return allreduce.plain(compensated, self.group)

    def _sparse(self, way: Way, taken: Sequence[Taken]) -> Sequence[Reduced | None]:
        """Units end to end as one: the rounds, most of the cost of small messages, are paid for once."""
        assert isinstance(self.compressor, Sparsifier)
        keys = tuple(one.unit.keys for one in taken)
        joint, carry = Joint(taken), self._carry(keys)
        reduced, carry = self._reduced(way, joint, self.compressor, all(one.finite for one in taken), carry)
        if reduced is None:  # all ranks keep the states they had, whether or not theirs was the fault
            return [None] * len(taken)
        self.carries = {other: value for other, value in self.carries.items() if not _overlap(other, keys)}
        self.carries[keys] = carry
        parts = joint.cut(reduced)
        for one, part in zip(taken, parts, strict=True):
            one.unit.inner, one.unit.company = one.state, joint.numel
            if self.mode == "mask":
                one.unit.mask = part.positions
        return parts

    def _reduced(
        self, way: Way, joint: Joint, compressor: Sparsifier, finite: bool, carry: Carry
    ) -> tuple[Reduced | None, Carry]:
        if way == "shared":
            known = compressor.synchronised or self.mode == "mask"
            return allreduce.shared(
                joint.values_at, joint.positions, joint.numel, finite=finite, compressor=compressor, group=self.group,
                carry=carry, leader=None if known else self._step % self.group.size,
            )  # fmt: skip
        assert joint.positions is not None
        if way == "gather":
            return allreduce.gather(
                joint.values, joint.positions, joint.numel, finite=finite, compressor=compressor, group=self.group,
                carry=carry,
            )  # fmt: skip
        return allreduce.split(
            joint.values, joint.positions, joint.numel, finite=finite, compressor=compressor, group=self.group,
            carry=carry, keep=sum(self._due(one.unit, compressor) for one in joint.taken),
            importance=_importance(joint.taken), offsets=joint.parameter_offsets,
        )  # fmt: skip

    def _carry(self, keys: Company) -> Carry:
        return self.carries.get(keys, Carry())

    @staticmethod
    def _due(unit: Unit, compressor: Sparsifier) -> int:
        counts = unit.inner.get("counts")
        return sum(counts) if counts else compressor.count(unit.layout.numel)

    def _scores(self, compensated: Tensor, unit: Unit) -> tuple[float, ...]:
        if self.weight_of is not None:
            weights = torch.cat([self.weight_of(key).detach().reshape(-1).float() for key in unit.keys])
            total = float((weights.double() * compensated.double()).abs().sum())
            return tuple(total * share for share in sensitivity(weights, compensated, unit.layout))
        total = float(compensated.double().square().sum())
        return tuple(total * share for share in gradient_norm_share(compensated, unit.layout))

    @property
    def _leads(self) -> bool:
        return self._step % self.group.size == self.group.rank

    def _way(self, unit: Unit, compressor: Sparsifier) -> Way:
        if self.mode == "mask":
            return "split" if unit.mask is None or self._step % MASK_EVERY == 0 else "shared"
        if self.mode != "auto":
            return self.mode
        if compressor.synchronised:
            return "shared"
        if self.model is None:
            self.model = calibrate(self.group, "cpu")
        n = max(unit.layout.numel, unit.company)  # what travelled together last time shares the rounds
        count = compressor.count(n)
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


def _importance(taken: Sequence[Taken]) -> Tensor | None:
    """Where each parameter has its own count, magnitudes compete relative to their parameter's threshold."""
    inverse: list[float] = []
    for one in taken:
        thresholds = one.state.get("thresholds")
        if one.unit.inner.get("counts") is None or not thresholds:
            return None
        inverse += [1.0 / t if 0 < t < float("inf") else 1.0 for t in thresholds]
    return torch.tensor(inverse, dtype=torch.float32, device=taken[0].compensated.device)


def _overlap(first: Company, second: Company) -> bool:
    return not {key for keys in first for key in keys}.isdisjoint(key for keys in second for key in keys)

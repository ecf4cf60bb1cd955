"""The mean of a gradient over all ranks, compressed on the wire: the state and the decisions behind the DDP hook.

:mod:`thinwire.compress` has the algorithms as pure functions. This keeps, on every rank, what they need between steps,
and decides for each unit which of them to use. It blocks; :mod:`thinwire.integrations.ddp` runs it beside backward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from thinwire.compress import allreduce
from thinwire.compress.allreduce import Carry, Credit, Reduced
from thinwire.compress.base import Compressor, Layout
from thinwire.compress.budget import allocate, gradient_norm_share
from thinwire.compress.cost import CostModel, Way, calibrate, quickest
from thinwire.compress.feedback import ErrorFeedback
from thinwire.compress.group import Group, sizes_of
from thinwire.compress.lowrank import LowRank
from thinwire.compress.quantize import Quantize
from thinwire.compress.schedule import Schedule, Signals
from thinwire.compress.sparsify import Sparsifier, add_scaled, all_finite
from thinwire.errors import MisuseError
from thinwire.integrations.units import Unit, make_unit, reshard
from thinwire.tensors.select import fill_sparse_

if TYPE_CHECKING:
    from torch.amp import GradScaler

__all__ = ["Exchange", "LayerBudget", "Mode", "Traffic", "reshard"]

Mode = Literal["auto", "split", "gather", "shared", "dense"]
MODES = ("auto", "split", "gather", "shared", "dense")
STATE_VERSION = 1


@final
@dataclass(frozen=True)
class Traffic:
    """Payload bytes of this rank since the start. ``dense_bytes`` is what a ring all-reduce of the same float32
    gradients would have received: ``2 (P - 1) / P * 4 n``."""

    received_bytes: int
    sent_bytes: int
    dense_bytes: int
    exchanges: int


@final
@dataclass(frozen=True)
class LayerBudget:
    """Shares the elements due over all parameters by their share of the squared gradient norm, anew every ``every``
    steps; parameters of fewer than ``whole_below`` elements are sent whole (:mod:`thinwire.compress.budget`)."""

    every: int = 50
    minimum: int = 1
    maximum_density: float = 1.0
    whole_below: int = 0


@final
class Exchange:
    """Reduces units over a group, in place. All ranks must call it for the same units in the same order.

    A *step* ends when a parameter comes by for the second time; until then it can be undone (``rollback``).
    """

    def __init__(
        self,
        compressor: Compressor | None,
        group: Group,
        *,
        mode: Mode = "auto",
        schedule: Schedule | None = None,
        layer_budget: LayerBudget | None = None,
        scaler: GradScaler | None = None,
        rollback: bool | None = None,
        learning_rate_of: Callable[[str], float] | None = None,
    ) -> None:
        self.feedback = compressor if isinstance(compressor, ErrorFeedback) else None
        self.base = compressor.compressor if isinstance(compressor, ErrorFeedback) else compressor
        self.compressor = self.base
        self.group = group
        self.mode = mode
        self.schedule = schedule
        self.layer_budget = layer_budget
        self.scaler = scaler
        self.rollback = scaler is not None if rollback is None else rollback
        self.learning_rate_of = learning_rate_of
        self.dense_bytes = 0
        self.exchanges = 0
        self.step = 0
        self.model: CostModel | None = None
        self._check()
        self._units: dict[tuple[str, ...], Unit] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._loaded_units: dict[tuple[str, ...], dict[str, Any]] = {}
        self._schedule_state = schedule.init() if schedule else {}
        self._counts: dict[str, int] = {}
        self._seen: set[str] = set()
        self._scale = 1.0
        self._bad = False
        self._norm2 = 0.0
        self._scores: dict[str, float] = {}
        self._losses: list[float] = []
        self._set_density()
        self._handshake()

    # --- agreement -------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.mode not in MODES:
            raise MisuseError(f"mode={self.mode!r}; give one of {', '.join(MODES)}")
        known = (Sparsifier, Quantize, LowRank)
        if self.base is not None and not isinstance(self.base, known):
            raise MisuseError(f"no exchange carries {self.base!r}; use a Sparsifier, Quantize or LowRank")
        if self.mode in ("split", "gather", "shared") and not isinstance(self.base, Sparsifier):
            raise MisuseError(f"mode={self.mode!r} carries sparse updates; {self.base!r} makes none")
        if self.layer_budget and not (isinstance(self.base, Sparsifier) and self.base.by_parameter):
            raise MisuseError(f"{self.base!r} does not select by parameter; a layer budget needs TopK")

    def _handshake(self) -> None:
        mine = json.dumps([STATE_VERSION, repr(self.feedback or self.base), self.mode, repr(self.schedule),
                           repr(self.layer_budget), self.rollback]).encode()  # fmt: skip
        data = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        sizes = sizes_of(self.group, data.numel())
        if max(sizes) > 1 << 16:
            raise MisuseError("a rank announces a configuration of over 64 KiB; do all run the same program?")
        said = [bytes(part.cpu().numpy()) for part in self.group.all_gather(data, sizes)]
        if len(set(said)) > 1:
            lines = "; ".join(f"rank {r}: {text.decode(errors='replace')}" for r, text in enumerate(said))
            raise MisuseError(f"the ranks were given different compressors or options; give all the same. {lines}")

    def traffic(self) -> Traffic:
        return Traffic(self.group.received_bytes, self.group.sent_bytes, self.dense_bytes, self.exchanges)

    # --- steps -----------------------------------------------------------------------------------------------------

    def observe(self, loss: float) -> None:
        """This rank's loss of the step; a schedule sees the mean over ranks."""
        self._losses.append(loss)

    def end_step(self) -> None:
        """Settles the step: undone on every rank if any part of it was not finite, otherwise kept for good."""
        if not self._seen:
            return
        for unit in self._units.values():
            if self._bad:
                unit.revert()
            else:
                unit.commit()
        if not self._bad:
            self._observe_step()
        self.step += 1
        self._seen.clear()
        self._bad, self._norm2 = False, 0.0
        self._losses.clear()

    def _observe_step(self) -> None:
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
            self.compressor = self.base.at(self.schedule.density(self._schedule_state))

    def _share_out(self) -> None:
        """New counts for every parameter, from the mean of all ranks' scores."""
        assert self.layer_budget
        assert isinstance(self.compressor, Sparsifier)
        scores = torch.tensor(list(self._scores.values()))
        self.group.all_reduce_(scores)
        numels = {key: n for unit in self._units.values() for key, n in zip(unit.keys, unit.layout.numels, strict=True)}
        ordered = [numels[key] for key in self._scores]
        counts = allocate(
            self.compressor.count(sum(ordered)),
            scores.nan_to_num(0.0, 0.0, 0.0).tolist(),
            ordered,
            minimum=self.layer_budget.minimum,
            maximum_density=self.layer_budget.maximum_density,
            whole_below=self.layer_budget.whole_below,
        )
        self._counts = dict(zip(self._scores, counts, strict=True))
        self._scores = {}

    # --- one unit --------------------------------------------------------------------------------------------------

    def reduce_(self, flat: Tensor, keys: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        """Replaces ``flat``, the gradients of the parameters ``keys`` end to end, by its mean over the ranks.

        Raises:
            RetryError: A rank died or did not answer in time. Nothing was written to ``flat``.
            MalformedError: A rank sent bytes that are not those of an exchange.
        """
        if self.group.size == 1 or flat.numel() == 0:
            return
        if not self._seen.isdisjoint(keys):
            self.end_step()
        if not self._seen:
            self._scale = float(self.scaler.get_scale()) if self.scaler else 1.0
        self._seen.update(keys)
        self.dense_bytes += 2 * (self.group.size - 1) * 4 * flat.numel() // self.group.size
        self.exchanges += 1
        if not flat.dtype.is_floating_point or flat.layout != torch.strided:
            raise MisuseError(f"a gradient of {flat.dtype}, {flat.layout}; exchange dense floating-point gradients")
        if self.compressor is None and flat.dtype == torch.float32:
            self.group.all_reduce_(flat)
            flat /= self.group.size
            return
        unit = self._unit_of(tuple(keys), Layout(tuple(tuple(shape) for shape in shapes)), flat.device)
        unit.begin(self.rollback)
        update = flat if flat.dtype == torch.float32 else flat.float()
        reduced = self._reduce(update, unit)
        if reduced is None:
            self._spoil(flat, update, unit)
        else:
            self._write(flat, reduced, unit)

    def _unit_of(self, keys: tuple[str, ...], layout: Layout, device: torch.device) -> Unit:
        unit = self._units.get(keys)
        if unit is not None and unit.layout == layout:
            return unit
        known = dict(self._loaded)
        for other in list(self._units.values()):  # the buckets were formed anew: residuals move with their parameters
            if not set(other.keys).isdisjoint(keys):
                other.commit()
                known.update(other.parts())
        inner = self.compressor.init(layout, device) if self.compressor is not None else {}
        unit = make_unit(keys, layout, device, self.feedback, inner, known)
        saved = self._loaded_units.pop(keys, None)
        if saved:
            unit.inner, unit.learning_rates = saved["inner"], saved["learning_rates"]
            unit.carry = Carry(**saved["carry"])
        elif "seed" in unit.inner:
            unit.inner["seed"] = self.group.rank
        self._loaded.update(known)  # parameters of a former bucket that are in none yet
        for key in keys:
            self._loaded.pop(key, None)
        for other in [other for other in self._units.values() if not set(other.keys).isdisjoint(keys)]:
            del self._units[other.keys]
        self._units[keys] = unit
        return unit

    def _reduce(self, update: Tensor, unit: Unit) -> Reduced | None:
        if isinstance(self.compressor, Sparsifier):
            return self._reduce_sparse(update, unit, self.compressor)
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

    def _reduce_sparse(self, update: Tensor, unit: Unit, compressor: Sparsifier) -> Reduced | None:
        way = self._way(unit, compressor)
        self._apply_counts(unit)
        state = unit.inner
        if way == "dense" or (way == "shared" and not compressor.synchronised and not self._leads(unit)):
            compensated, finite = self._compensate(update, unit)
            positions: Tensor | None = None
            if way == "dense":
                return allreduce.plain(compensated, self.group)
        else:
            compensated, positions, finite, state = self._select(update, unit, compressor)
        self._score(compensated, unit)
        reduced = self._exchange(way, compensated, positions, finite, compressor, unit)
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
                known=compressor.synchronised,
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

    def _leads(self, unit: Unit) -> bool:
        return unit.carry.step % self.group.size == self.group.rank

    def _way(self, unit: Unit, compressor: Sparsifier) -> Way:
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

    # --- layers ----------------------------------------------------------------------------------------------------

    def _apply_counts(self, unit: Unit) -> None:
        if self._counts and self._counts.keys() >= set(unit.keys):
            unit.inner = {**unit.inner, "counts": [self._counts[key] for key in unit.keys]}

    def _score(self, compensated: Tensor, unit: Unit) -> None:
        if self.layer_budget and self.step % self.layer_budget.every == 0:
            norm2 = float(compensated.double().square().sum()) if compensated.numel() else 0.0
            shares = gradient_norm_share(compensated, unit.layout)
            self._scores.update({key: norm2 * share for key, share in zip(unit.keys, shares, strict=True)})

    # --- results ---------------------------------------------------------------------------------------------------

    def _write(self, flat: Tensor, reduced: Reduced, unit: Unit) -> None:
        values = reduced.values if self._scale == 1.0 else reduced.values * self._scale
        credits = reduced.credits
        if flat.dtype != torch.float32:
            rounded = values.to(flat.dtype)
            # What the gradient's own type cannot hold stays with every rank.
            lost = (rounded.float() - values) / self._scale
            credits = (*credits, Credit(reduced.positions, lost))
            values = rounded
        if not all_finite(values):  # too large once scaled for the loss: the scaler will skip this step
            self._bad = True
        if reduced.positions is None:
            flat.copy_(values)
        elif flat.dtype == torch.float32:
            fill_sparse_(flat, reduced.positions, values)
        else:
            flat.zero_()
            flat[reduced.positions] = values
        unit.settle(credits, self.feedback is not None and self.feedback.masking)
        self._norm2 += float(reduced.values.double().square().sum())

    def _spoil(self, flat: Tensor, update: Tensor, unit: Unit) -> None:
        """Some rank's gradient is not finite. All ranks see NaN, as they would without compression, so that whoever
        looks for overflow (a GradScaler) finds it; the residuals are as before."""
        self._bad = True
        if unit.residual is not None and not unit.undo:
            unit.residual.sub_(update).nan_to_num_(0.0, 0.0, 0.0)  # without rollback: to rounding, where it was finite
            if unit.velocity is not None:
                unit.velocity.nan_to_num_(0.0, 0.0, 0.0)
        flat.fill_(float("nan"))

    # --- saving ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.end_step()
        parameters = dict(self._loaded)
        for unit in self._units.values():
            parameters.update({key: {n: t.clone() for n, t in part.items()} for key, part in unit.parts().items()})
        units = [
            {"keys": list(u.keys), "inner": u.inner, "carry": asdict(u.carry), "learning_rates": u.learning_rates}
            for u in self._units.values()
        ]
        return {
            "version": STATE_VERSION,
            "rank": self.group.rank,
            "world_size": self.group.size,
            "compressor": repr(self.feedback or self.base),
            "step": self.step,
            "parameters": parameters,
            "units": units,
            "schedule": self._schedule_state,
            "counts": self._counts,
            "model": asdict(self.model) if self.model else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state of :meth:`state_dict`.

        Raises:
            MisuseError: It is of another compressor, rank or number of ranks.
        """
        mine = {"version": STATE_VERSION, "rank": self.group.rank, "world_size": self.group.size,
                "compressor": repr(self.feedback or self.base)}  # fmt: skip
        for name, expected in mine.items():
            if state.get(name) != expected:
                raise MisuseError(
                    f"this state has {name} {state.get(name)!r}, the exchange has {expected!r}; give each rank its "
                    "own, and use reshard() for another number of ranks",
                    expected=expected,
                    actual=state.get(name),
                )
        self._units.clear()
        self._seen.clear()
        self._bad = False
        self._loaded = {key: dict(parts) for key, parts in state["parameters"].items()}
        self._loaded_units = {tuple(unit["keys"]): unit for unit in state["units"]}
        self._schedule_state, self._counts, self.step = state["schedule"], dict(state["counts"]), int(state["step"])
        self.model = CostModel(**state["model"]) if state["model"] else None
        self._set_density()


def _importance(unit: Unit, device: torch.device) -> Tensor | None:
    """Where each parameter has its own count, magnitudes compete relative to their parameter's threshold."""
    thresholds = unit.inner.get("hints")
    if unit.inner.get("counts") is None or not thresholds:
        return None
    inverse = [1.0 / t if 0 < t < float("inf") else 1.0 for t in thresholds]
    return torch.tensor(inverse, dtype=torch.float32, device=device)

"""The mean of a gradient over all ranks, compressed on the wire: the state and the decisions behind the DDP hook.

:mod:`thinwire.compress` has the algorithms as pure functions. This keeps, on every rank, what they need between steps,
and decides for each unit which of them to use. It blocks; :mod:`thinwire.integrations.ddp` runs it beside backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from thinwire.aggregate.base import Aggregator
from thinwire.aggregate.weights import Weighting
from thinwire.compress.allreduce import Carry, Credit, Reduced
from thinwire.compress.base import Compressor, Layout, State
from thinwire.compress.cost import CostModel
from thinwire.compress.feedback import ErrorFeedback
from thinwire.compress.group import Group
from thinwire.compress.lowrank import LowRank
from thinwire.compress.quantize import Quantize
from thinwire.compress.schedule import Schedule
from thinwire.compress.sparsify import Sparsifier, all_finite
from thinwire.errors import MisuseError
from thinwire.integrations.agreement import agree
from thinwire.integrations.control import Control, LayerBudget
from thinwire.integrations.joint import Taken
from thinwire.integrations.reduction import MODES, Mode, Reduction
from thinwire.integrations.regions import Regions
from thinwire.integrations.units import Unit, make_unit, reshard
from thinwire.integrations.weighing import Weigher
from thinwire.tensors.select import fill_sparse_

if TYPE_CHECKING:
    from torch.amp import GradScaler

__all__ = ["Exchange", "LayerBudget", "Mode", "Traffic", "reshard"]

STATE_VERSION = 2


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
class _Pending:
    """What was added and not yet exchanged: where the mean goes, the update as float32, what must not be sent."""

    flat: Tensor
    update: Tensor
    taken: Taken
    idle: list[tuple[str, int, Tensor]]


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
        unused_parameters: bool = False,
        aggregate: Weighting | Aggregator | None = None,
        learning_rate_of: Callable[[str], float] | None = None,
        weight_of: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.feedback = compressor if isinstance(compressor, ErrorFeedback) else None
        self.base = compressor.compressor if isinstance(compressor, ErrorFeedback) else compressor
        self.group = group
        self.scaler = scaler
        self.rollback = scaler is not None if rollback is None else rollback
        self.unused_parameters = unused_parameters
        self.reduction = Reduction(self.base, self.feedback, group, mode, learning_rate_of)
        if layer_budget and layer_budget.score == "sensitivity":
            if weight_of is None:
                raise MisuseError("a budget by sensitivity needs the weights; attach() the exchange to a model")
            self.reduction.weight_of = weight_of
        self.dense_bytes = 0
        self.exchanges = 0
        self._check(mode)
        self.weigher = Weigher(aggregate, group) if isinstance(aggregate, Weighting) else None
        self.regions = self._regions(aggregate)
        self.control = Control(self.reduction, group, schedule, layer_budget)
        self._units: dict[tuple[str, ...], Unit] = {}
        self._pending: list[_Pending] = []
        self._whole: list[tuple[Tensor, Tensor]] = []  # for an aggregator: where its result goes, and the update
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._loaded_units: dict[tuple[str, ...], dict[str, Any]] = {}
        self._seen: set[str] = set()
        self._scale = 1.0
        self._bad = False
        self._handshake()

    # --- agreement -------------------------------------------------------------------------------------------------

    def _check(self, mode: Mode) -> None:
        if mode not in MODES:
            raise MisuseError(f"mode={mode!r}; give one of {', '.join(MODES)}")
        known = (Sparsifier, Quantize, LowRank)
        if self.base is not None and not isinstance(self.base, known):
            raise MisuseError(f"no exchange carries {self.base!r}; use a Sparsifier, Quantize or LowRank")
        if mode in ("split", "gather", "shared", "mask") and not isinstance(self.base, Sparsifier):
            raise MisuseError(f"mode={mode!r} carries sparse updates; {self.base!r} makes none")

    def _regions(self, aggregate: Weighting | Aggregator | None) -> Regions | None:
        if aggregate is None or isinstance(aggregate, Weighting):
            return None
        if not isinstance(aggregate, Aggregator):
            raise MisuseError(f"aggregate={aggregate!r}; give a Weighting, such as SignalWeighted(), or an Aggregator")
        if self.base is not None or self.reduction.mode not in ("auto", "dense"):
            raise MisuseError(f"{aggregate!r} looks at whole gradients; use it without a compressor and without a mode")
        return Regions(aggregate, self.group)

    def _handshake(self) -> None:
        control = self.control
        options = (self.reduction.mode, control.schedule, control.layer_budget, self.rollback, self.unused_parameters)
        many = (self.weigher and self.weigher.weighting, self.regions and self.regions.aggregator)
        mine = [STATE_VERSION, repr(self.feedback or self.base), *map(repr, options), *map(repr, many)]
        agree(self.group, mine, "they were given different compressors or options; give all the same")

    def traffic(self) -> Traffic:
        return Traffic(self.group.received_bytes, self.group.sent_bytes, self.dense_bytes, self.exchanges)

    # --- steps -----------------------------------------------------------------------------------------------------

    def observe(self, name: str, value: float) -> None:
        """This rank's loss (a schedule sees the mean over ranks), or what else a weighting looks at."""
        if name == "loss":
            self.control.observe(value)
        if self.weigher:
            self.weigher.observe(name, value)

    def refer_to(self, gradients: Mapping[str, Tensor]) -> None:
        """Raises:
        MisuseError: Nothing looks at it.
        """
        if self.weigher is None or "dot_reference" not in self.weigher.needs:
            raise MisuseError("no signal compares with a reference gradient; weight by CosineToReference()")
        self.weigher.refer_to(gradients)

    def end_step(self) -> None:
        """Settles the step: undone on every rank if any part of it was not finite, otherwise kept for good."""
        if not self._seen:
            return
        for unit in self._units.values():
            if self._bad:
                unit.revert()
            else:
                unit.commit()
        self.control.end_step(good=not self._bad)
        if self.weigher:
            self.weigher.end_step(good=not self._bad)
        self._seen.clear()
        self._bad = False

    # --- one unit --------------------------------------------------------------------------------------------------

    def reduce_(
        self, flat: Tensor, keys: Sequence[str], shapes: Sequence[tuple[int, ...]], given: State | None = None
    ) -> None:
        """Replaces ``flat``, the gradients of the parameters ``keys`` end to end, by its mean over the ranks.

        It is :meth:`add` and :meth:`flush` in one.
        """
        self.add(flat, keys, shapes, given)
        self.flush()

    def add(
        self, flat: Tensor, keys: Sequence[str], shapes: Sequence[tuple[int, ...]], given: State | None = None
    ) -> None:
        """Adds ``flat`` to what waits and selects from it; :meth:`flush` exchanges all that was added. ``given`` is
        added to the compressor's state for this call alone.

        Raises:
            MisuseError: It is not a dense floating-point gradient.
        """
        if not flat.dtype.is_floating_point or flat.layout != torch.strided:
            raise MisuseError(
                f"a gradient of {flat.dtype}, {flat.layout}, of parameters {', '.join(keys[:3])}; only dense "
                "floating-point gradients are exchanged: build embeddings with sparse=False"
            )
        if self.group.size == 1 or flat.numel() == 0:
            return
        if not self._seen.isdisjoint(keys):
            self.flush()
            self.end_step()
        if not self._seen:
            self._scale = float(self.scaler.get_scale()) if self.scaler else 1.0
            if self.weigher:
                self.weigher.begin_step()
        self._seen.update(keys)
        self.dense_bytes += 2 * (self.group.size - 1) * 4 * flat.numel() // self.group.size
        self.exchanges += 1
        layout = Layout(tuple(tuple(shape) for shape in shapes))
        update = flat if flat.dtype == torch.float32 else flat.float()
        if self.weigher:
            self.weigher.see_gradient(update, keys, layout.numels, self._scale)
            _multiply_(update, self.weigher.gain)
        if self.regions:
            self._whole.append((flat, update))
            return
        if self.reduction.compressor is None and flat.dtype == torch.float32:
            self._reduce_dense(flat, keys[0])
            return
        unit = self._unit_of(tuple(keys), layout, flat.device)
        unit.begin(self.rollback)
        self.control.apply_counts(unit)
        idle = self._set_idle_aside(flat, unit)
        before = unit.inner
        unit.inner = {**before, **(given or {})}
        taken = self.reduction.take(update, unit, scale=self._scale, step=self.control.step, score=self.control.scoring)
        unit.inner = before
        state = {key: value for key, value in taken.state.items() if key not in (given or {})}
        self._pending.append(_Pending(flat, update, replace(taken, state=state), idle))
        self.control.take_scores(unit)

    @property
    def pending_numel(self) -> int:
        """Elements that were added since the last :meth:`flush`."""
        return sum(one.flat.numel() for one in self._pending) + sum(flat.numel() for flat, _ in self._whole)

    def flush(self) -> None:
        """Exchanges what was added and writes the means. Collective.

        Raises:
            RetryError: A rank died or did not answer in time. Nothing was written.
            MalformedError: A rank sent bytes that are not those of an exchange.
        """
        if self._whole:
            self._aggregate()
        pending, self._pending = self._pending, []
        for one, reduced in zip(pending, self.reduction.exchange([one.taken for one in pending]), strict=True):
            unit = one.taken.unit
            unit.put_back(one.idle)
            if reduced is None:
                self._spoil(one.flat, one.update, unit)
            else:
                self._write(one.flat, reduced, unit)

    def _reduce_dense(self, flat: Tensor, key: str) -> None:
        weigher = self.weigher
        own = flat.clone() if weigher and "agreement" in weigher.needs else None
        self.group.all_reduce_(flat)
        flat /= self.group.size
        if weigher:
            self._bad |= not all_finite(flat)
            weigher.see_dense(key, own, flat, self._scale)

    def _aggregate(self) -> None:
        """Whole updates, all at once, since what is robust looks at all of a worker's at once."""
        assert self.regions
        waiting, self._whole = self._whole, []
        update = torch.cat([one for _, one in waiting])
        result = self.regions.aggregate(update if self._scale == 1.0 else update / self._scale)
        if result is None:
            self._bad = True
            result = torch.full_like(update, float("nan"))
        pieces = torch.split(result * self._scale, [flat.numel() for flat, _ in waiting])
        for (flat, _), piece in zip(waiting, pieces, strict=True):
            flat.copy_(piece)

    def _unit_of(self, keys: tuple[str, ...], layout: Layout, device: torch.device) -> Unit:
        unit = self._units.get(keys)
        if unit is not None and unit.layout == layout:
            return unit
        known = dict(self._loaded)
        for other in list(self._units.values()):  # the buckets were formed anew: residuals move with their parameters
            if not set(other.keys).isdisjoint(keys):
                other.commit()
                known.update(other.parts())
        inner = self.reduction.compressor.init(layout, device) if self.reduction.compressor is not None else {}
        unit = make_unit(keys, layout, device, self.feedback, inner, known)
        saved = self._loaded_units.pop(keys, None)
        if saved:
            unit.inner, unit.learning_rates = saved["inner"], saved["learning_rates"]
            unit.mask, unit.company = saved["mask"], saved["company"]
        elif "seed" in unit.inner:
            unit.inner["seed"] = self.group.rank
        self._loaded.update(known)  # parameters of a former bucket that are in none yet
        for key in keys:
            self._loaded.pop(key, None)
        for other in [other for other in self._units.values() if not set(other.keys).isdisjoint(keys)]:
            del self._units[other.keys]
        self._units[keys] = unit
        return unit

    # --- parameters without a gradient -----------------------------------------------------------------------------

    def _set_idle_aside(self, flat: Tensor, unit: Unit) -> list[tuple[str, int, Tensor]]:
        """What waits for a parameter that no rank used in this step must not be sent: DDP would not apply it."""
        if not self.unused_parameters or unit.residual is None:
            return []
        pieces = torch.split(flat, list(unit.layout.numels))
        used = torch.tensor([float(piece.any()) for piece in pieces])
        self.group.all_reduce_(used)
        return unit.set_aside([i for i, count in enumerate(used.tolist()) if not count])

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
        self.control.saw(reduced.values)
        if self.weigher:
            self.weigher.see_mean(unit.keys[0], reduced, flat, self._scale)

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
        """All that the next step depends on. It ends the step, which is collective where there is a schedule."""
        self.end_step()
        parameters = dict(self._loaded)
        for unit in self._units.values():
            parameters.update({key: {n: t.clone() for n, t in part.items()} for key, part in unit.parts().items()})
        units = [
            {
                "keys": list(u.keys),
                "inner": u.inner,
                "company": u.company,
                "mask": u.mask,
                "learning_rates": u.learning_rates,
            }
            for u in self._units.values()
        ]
        aggregating = self.weigher or self.regions
        return {
            "version": STATE_VERSION,
            "rank": self.group.rank,
            "world_size": self.group.size,
            "compressor": repr(self.feedback or self.base),
            "parameters": parameters,
            "units": units,
            "carries": [(keys, asdict(carry)) for keys, carry in self.reduction.carries.items()],
            "control": self.control.state_dict(),
            "aggregate": aggregating.state_dict() if aggregating else None,
            "model": asdict(self.reduction.model) if self.reduction.model else None,
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
        self.reduction.carries = {keys: Carry(**carry) for keys, carry in state["carries"]}
        self.reduction.model = CostModel(**state["model"]) if state["model"] else None
        self.control.load_state_dict(state["control"])
        aggregating = self.weigher or self.regions
        if aggregating and state["aggregate"] is not None:  # resharding leaves none
            aggregating.load_state_dict(state["aggregate"])


def _multiply_(update: Tensor, gain: float) -> None:
    """In place. What has no weight is zeroed: 0 times NaN would be NaN."""
    if gain == 0.0:
        update.zero_()
    elif gain != 1.0:
        update.mul_(gain)

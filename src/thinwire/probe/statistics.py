"""What a tracker found in one step: by tensor, by layer, by kind, and in all, against each lag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from math import nan
from operator import add
from typing import Any

from thinwire.probe.changes import Changes
from thinwire.probe.kinds import KINDS, Place
from thinwire.probe.null import Excess, excess_of
from thinwire.probe.null_simulation import NullStep

__all__ = ["LagStats", "StepStats"]


def _sum(parts: list[Changes]) -> Changes:
    return reduce(add, parts, Changes())


@dataclass(frozen=True, slots=True)
class LagStats:
    """What changed in the last ``lag`` steps: ``tensors`` by name, and where they belong (``places``).

    ``null``: the share that would have changed if gradients had been random; None if it is not measured. All properties
    are of all tensors together; ``kinds`` and ``layers`` are sums over parts of them.
    """

    lag: int
    tensors: dict[str, Changes]
    places: dict[str, Place] = field(repr=False)
    null_step: NullStep | None = field(default=None, repr=False)

    @property
    def total(self) -> Changes:
        """All tensors together."""
        return _sum(list(self.tensors.values()))

    @property
    def kinds(self) -> dict[str, Changes]:
        """By kind of parameter, in the order of a model (:data:`thinwire.probe.kinds.KINDS`)."""
        found = self._by(lambda place: place.kind)
        return {kind: found[kind] for kind in KINDS if kind in found}

    @property
    def layers(self) -> dict[str, Changes]:
        """By layer: ``3``, or ``2.1`` in a ResNet; what lies outside of layers is ``""``."""
        found = self._by(lambda place: place.layer)
        return {".".join(map(str, layer)): found[layer] for layer in sorted(found)}

    @property
    def sparsity(self) -> float:
        """The share of elements that did not change, or not by more than the limits."""
        return self.total.sparsity

    @property
    def density(self) -> float:
        """The share of elements that changed by more than the limits."""
        return self.total.density

    @property
    def changed(self) -> int:
        """Elements of which any bit changed."""
        return self.total.changed

    @property
    def update_ratio(self) -> float:
        """Norm of the difference over the norm of the weights; NaN in a fast comparison."""
        return self.total.update_ratio

    @property
    def ulps(self) -> tuple[int, ...]:
        """Changed elements by ULP distance (:func:`thinwire.probe.changes.ulp_bin_label`)."""
        return self.total.ulps

    @property
    def null(self) -> float | None:
        """The share of all elements that random gradients would have changed; of those that were there from the start,
        where tensors were added since."""
        return self.null_of([name for name in self.tensors if name in self._with_null])

    @property
    def excess(self) -> Excess | None:
        """What was observed beyond the null, of the elements that have one."""
        null = self.null
        if self.null_step is None or null is None:
            return None
        observed = _sum([changes for name, changes in self.tensors.items() if name in self._with_null])
        return excess_of(observed.density, null, self.null_step.error)

    @property
    def _with_null(self) -> dict[str, float]:
        return {} if self.null_step is None else self.null_step.tensors

    def null_of(self, names: list[str]) -> float | None:
        """The null of some tensors together."""
        if self.null_step is None:
            return None
        total = sum(self.tensors[name].elements for name in names)
        parts = (self.null_step.tensors.get(name, 0.0) * self.tensors[name].elements for name in names)
        return sum(parts) / total if total else 0.0

    def _by(self, key: Callable[[Place], Any]) -> dict[Any, Changes]:
        groups: dict[Any, list[Changes]] = {}
        for name, changes in self.tensors.items():
            groups.setdefault(key(self.places[name]), []).append(changes)
        return {group: _sum(parts) for group, parts in groups.items()}


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one call of :meth:`thinwire.probe.tracker.SparsityTracker.step` found.

    Attributes:
        step: the caller's number of the step.
        lags: by lag, for the lags that were due.
        added: tensors seen for the first time; they are measured from now on. removed: tensors that are gone.
        restarted: tensors whose shape or data type is another one; they are measured anew from now on.
        seconds: how long the measurement took.

    The properties are those of the shortest lag that was due; NaN, 0 or None where none was.
    """

    step: int
    lags: dict[int, LagStats]
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def shortest(self) -> LagStats:
        """The shortest lag that was due; one of no tensors where none was."""
        return self.lags[min(self.lags)] if self.lags else LagStats(0, {}, {})

    @property
    def sparsity(self) -> float:
        """See :class:`LagStats`."""
        return self.shortest.sparsity if self.lags else nan

    @property
    def density(self) -> float:
        """See :class:`LagStats`."""
        return self.shortest.density if self.lags else nan

    @property
    def update_ratio(self) -> float:
        """See :class:`LagStats`."""
        return self.shortest.update_ratio if self.lags else nan

    @property
    def changed(self) -> int:
        """See :class:`LagStats`."""
        return self.shortest.changed

    @property
    def ulps(self) -> tuple[int, ...]:
        """See :class:`LagStats`."""
        return self.shortest.ulps

    @property
    def tensors(self) -> dict[str, Changes]:
        """See :class:`LagStats`."""
        return self.shortest.tensors

    @property
    def layers(self) -> dict[str, Changes]:
        """See :class:`LagStats`."""
        return self.shortest.layers

    @property
    def kinds(self) -> dict[str, Changes]:
        """See :class:`LagStats`."""
        return self.shortest.kinds

    @property
    def null(self) -> float | None:
        """See :class:`LagStats`."""
        return self.shortest.null

    @property
    def excess(self) -> Excess | None:
        """See :class:`LagStats`."""
        return self.shortest.excess

    def reduce(self, group: Any = None) -> StepStats:
        """The same of all ranks of a torch.distributed ``group`` together, each of which must call this.

        For shards: an element that several ranks hold counts several times. The null's shares are averaged by elements.
        """
        import torch.distributed as dist

        mine = {lag: (stats.tensors, stats.null_step) for lag, stats in self.lags.items()}
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (mine, self.places()), group=group)
        places: dict[str, Place] = {}
        for _, theirs in everyone:
            places |= theirs
        lags = {lag: _joined(lag, [part[lag] for part, _ in everyone if lag in part], places) for lag in self.lags}
        return replace(self, lags=lags)

    def places(self) -> dict[str, Place]:
        """Where the tensors belong, by name."""
        return {name: place for stats in self.lags.values() for name, place in stats.places.items()}


def _joined(lag: int, parts: list[tuple[dict[str, Changes], NullStep | None]], places: dict[str, Place]) -> LagStats:
    tensors: dict[str, Changes] = {}
    for found, _ in parts:
        for name, changes in found.items():
            tensors[name] = tensors.get(name, Changes()) + changes
    null = None
    if all(step is not None for _, step in parts):
        total = sum(changes.elements for changes in tensors.values()) or 1
        fraction, variance = 0.0, 0.0
        counts = dict.fromkeys(tensors, 0.0)
        for found, step in parts:
            assert step is not None
            share = sum(changes.elements for changes in found.values()) / total
            fraction, variance = fraction + share * step.fraction, variance + (share * step.error) ** 2
            for name, changes in found.items():
                counts[name] += step.tensors.get(name, 0.0) * changes.elements
        by_name = {name: counts[name] / max(1, tensors[name].elements) for name in tensors}
        null = NullStep(fraction, variance**0.5, by_name)
    return LagStats(lag, tensors, {name: places[name] for name in tensors}, null)

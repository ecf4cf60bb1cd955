"""Units that travel together, seen as one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

from thinwire.compress.allreduce import Credit, Reduced
from thinwire.compress.base import NUMEL_MAX, State
from thinwire.compress.cost import Way
from thinwire.errors import MisuseError
from thinwire.integrations.units import Unit

__all__ = ["Joint", "Taken"]


@final
@dataclass(frozen=True)
class Taken:
    """A unit whose update waits to be exchanged: ``compensated`` is that and its residual, ``positions`` what was
    selected of it (None: nothing, on this rank), ``state`` the compressor's once it is sent."""

    unit: Unit
    compensated: Tensor
    positions: Tensor | None
    finite: bool
    state: State
    way: Way


@final
class Joint:
    """Units end to end. Positions in it are those in a unit, shifted by the elements of the units before."""

    def __init__(self, taken: Sequence[Taken]) -> None:
        self.taken = taken
        *self.starts, self.numel = accumulate((one.compensated.numel() for one in taken), initial=0)
        if self.numel > NUMEL_MAX:
            raise MisuseError(f"{self.numel} elements travel together, more than {NUMEL_MAX}; let fewer wait")

    @property
    def parameter_offsets(self) -> list[int]:
        pairs = zip(self.starts, self.taken, strict=True)
        return [start + offset for start, one in pairs for offset in one.unit.layout.offsets]

    @property
    def positions(self) -> Tensor | None:
        """What was selected in all units, int32 ``[k]``; None where this rank has not selected."""
        chosen = [one.positions for one in self.taken]
        if any(positions is None for positions in chosen):
            return None
        return torch.cat([p + start for p, start in zip(chosen, self.starts, strict=True) if p is not None])

    @property
    def values(self) -> Tensor:
        """What lies there, float32 ``[k]``."""
        pairs = [(one.compensated, one.positions) for one in self.taken]
        return torch.cat([x.index_select(0, positions) for x, positions in pairs if positions is not None])

    def values_at(self, positions: Tensor) -> Tensor:
        parts = self._parts(positions.to(self.taken[0].compensated.device), positions)
        return torch.cat(
            [one.compensated.index_select(0, where) for one, (where, _) in zip(self.taken, parts, strict=True)]
        )

    def cut(self, reduced: Reduced) -> list[Reduced]:
        """A joint result, unit by unit."""
        assert reduced.positions is not None
        means = self._parts(reduced.positions, reduced.values)
        credits = [self._parts(credit.positions, credit.values) for credit in reduced.credits]
        return [
            Reduced(where, values, tuple(Credit(*credit[i]) for credit in credits))
            for i, (where, values) in enumerate(means)
        ]

    def _parts(self, positions: Tensor | None, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        assert positions is not None
        if len(self.starts) == 1:
            return [(positions, values)]
        borders = torch.tensor(self.starts[1:], dtype=torch.int32, device=positions.device)
        cuts = [0, *torch.searchsorted(positions, borders).tolist(), positions.numel()]
        return [
            (positions[low:high] - start, values[low:high])
            for start, low, high in zip(self.starts, cuts[:-1], cuts[1:], strict=True)
        ]

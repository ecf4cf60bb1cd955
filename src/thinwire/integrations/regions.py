"""An aggregator of whole updates, spread over the ranks: each sees everybody's slice of its own region.

The bytes are those of a ring all-reduce, ``2 n (P - 1) / P``: an all-to-all brings every rank the P slices of its
region, an all-gather takes the results back. In between, linear aggregators need the Gram matrix of the whole updates,
which is the sum of those of the slices: P x P numbers.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from thinwire.aggregate.base import Aggregator, Coordinatewise, Linear, gram_matrix, weighted_sum
from thinwire.compress.group import Group
from thinwire.compress.sparsify import all_finite
from thinwire.errors import MisuseError, RefuseError

__all__ = ["Regions"]


@final
class Regions:
    """Runs ``aggregator`` over a group. ``coefficients`` are those of the last step, if it was a linear one."""

    def __init__(self, aggregator: Aggregator, group: Group) -> None:
        if not isinstance(aggregator, Linear | Coordinatewise):
            raise MisuseError(f"{aggregator!r} is neither Linear nor Coordinatewise; derive it from one of them")
        self.aggregator = aggregator
        self.group = group
        self.state = aggregator.init(group.size)
        self.coefficients: Tensor | None = None
        self._previous: Tensor | None = None  # this rank's region of the last result

    def aggregate(self, update: Tensor) -> Tensor | None:
        """All ranks' ``update``, float32 ``[n]``, into one. Collective. None where no rank's is finite.

        A rank whose update is not finite is left out; the others' are aggregated.
        """
        size, rank, n = self.group.size, self.group.rank, update.numel()
        lengths = [n * (r + 1) // size - n * r // size for r in range(size)]
        outgoing = [part.contiguous().view(torch.uint8) for part in torch.split(update, lengths)]
        parts = self.group.all_to_all(outgoing, [4 * lengths[rank]] * size)
        slices = torch.stack([part.clone().view(torch.float32) for part in parts])
        try:
            mine = self._combine(slices, all_finite(update))
        except RefuseError:
            return None
        results = self.group.all_gather(mine.view(torch.uint8), [4 * length for length in lengths])
        return torch.cat([part.clone().view(torch.float32) for part in results])

    def _combine(self, slices: Tensor, finite: bool) -> Tensor:
        aggregator, group = self.aggregator, self.group
        if isinstance(aggregator, Coordinatewise):
            flags = torch.zeros(group.size)
            flags[group.rank] = float(finite)
            group.all_reduce_(flags)
            if not bool(flags.any()):
                raise RefuseError("no rank has a finite update")
            return aggregator.combine(slices[(flags > 0).to(slices.device)])
        assert isinstance(aggregator, Linear)
        rows = slices
        if aggregator.uses_previous:
            if self._previous is None or self._previous.numel() != slices.shape[1]:
                self._previous = torch.zeros_like(slices[0])
            rows = torch.cat([slices, self._previous.unsqueeze(0)])
        gram = gram_matrix(rows)
        group.all_reduce_(gram)
        self.coefficients, self.state = aggregator.coefficients(gram, self.state)
        result = weighted_sum(rows, self.coefficients)
        if aggregator.uses_previous:
            self._previous = result.clone()
        return result

    # --- saving ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"aggregator": repr(self.aggregator), "state": self.state, "previous": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        MisuseError: It is of another aggregator.
        """
        if state["aggregator"] != repr(self.aggregator):
            raise MisuseError(
                f"this state has the aggregator {state['aggregator']}, the exchange {self.aggregator!r}; give the same"
            )
        self.state, self._previous = state["state"], state["previous"]

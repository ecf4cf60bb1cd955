"""Every worker's weight, step by step: what a rank finds out about itself, told to all in a few floats.

The message goes out before the first bucket of a step. It has what is known then: the loss and whatever else was
observed before backward, and what the step before showed of the gradient. All ranks compute all weights from the same
numbers; each multiplies its own gradient by ``P * w`` before anything else is done to it. So the stream that carries
the residual is the weighted one, and what waits in it keeps the weight of its time:
``sum of applied + mean of residuals == sum over steps of sum_i w_i g_i``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any, final

import torch
from torch import Tensor

from thinwire.aggregate.base import Observation, Reading, State
from thinwire.aggregate.weights import Weighting
from thinwire.compress.allreduce import Reduced
from thinwire.compress.group import Group
from thinwire.errors import MisuseError

__all__ = ["OBSERVABLE", "Weigher"]

OBSERVABLE = ("loss", "tokens", "improvement")
"""What the training loop says; everything else is read off the gradients."""

_Sparse = tuple[Tensor | None, Tensor]


@final
class Weigher:
    """One rank's signals and the weights of all. ``gain`` is what this rank's gradient is multiplied by."""

    def __init__(self, weighting: Weighting, group: Group) -> None:
        self.weighting = weighting
        self.group = group
        self.needs = weighting.needs
        self.weights = torch.full((group.size,), 1 / group.size, dtype=torch.float64)
        self.readings: list[tuple[Reading, ...]] = []
        self.gain = 1.0
        self._states = [signal.init() for signal in weighting.signals]
        self._rule = weighting.init(group.size)
        self._said: dict[str, list[float]] = {name: [] for name in OBSERVABLE}
        self._measured: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._reference: dict[str, Tensor] = {}
        self._previous: dict[str, _Sparse] = {}

    # --- what is seen ----------------------------------------------------------------------------------------------

    def observe(self, name: str, value: float) -> None:
        self._said[name].append(value)

    def refer_to(self, gradients: Mapping[str, Tensor]) -> None:
        self._reference = {key: value.detach().reshape(-1).float() for key, value in gradients.items()}

    def see_gradient(self, update: Tensor, keys: Sequence[str], numels: Sequence[int], scale: float) -> None:
        """This rank's own gradient, ``scale`` times too large, before it is weighted."""
        if "norm2" in self.needs:
            self._add("norm2", float(torch.linalg.vector_norm(update, dtype=torch.float64) / scale) ** 2)
        if "dot_reference" in self.needs and self._reference:
            for key, piece in zip(keys, torch.split(update, list(numels)), strict=True):
                reference = self._reference.get(key)
                if reference is None or reference.numel() != piece.numel():
                    known = "of another size" if reference is not None else "missing"
                    raise MisuseError(f"the reference gradient of parameter {key} is {known}", parameter=key)
                self._add("dot_reference", _dot(piece, reference.to(piece.device)) / scale)
                self._add("reference_norm2", _dot(reference, reference))
        if "dot_previous" in self.needs and (before := self._previous.get(keys[0])) is not None:
            positions, values = before
            here = update if positions is None else update.index_select(0, positions)
            if here.numel() == values.numel():  # unless the buckets were formed anew
                self._add("dot_previous", _dot(here, values) / scale)
                self._add("previous_norm2", _dot(values, values))

    def see_mean(self, key: str, reduced: Reduced, flat: Tensor, scale: float) -> None:
        """The mean that was applied, and in its first credit what this rank sent; ``flat`` is where the mean was
        written, ``scale`` times too large. Costs what was sent, not what there is."""
        if "dot_previous" in self.needs:
            self._previous[key] = (reduced.positions, reduced.values)
        if "agreement" in self.needs:
            own = reduced.credits[0]
            there = flat if own.positions is None else flat.index_select(0, own.positions)
            kept = own.values != 0
            sent, mean = own.values[kept], there[kept].float() / scale
            self.see_others(sent, mean)

    def see_dense(self, key: str, own: Tensor | None, mean: Tensor, scale: float) -> None:
        """:meth:`see_mean` where everything was sent; ``own`` is what this rank sent, if agreement is wanted."""
        if "dot_previous" in self.needs:
            self._previous[key] = (None, mean / scale)
        if own is not None:
            self.see_others(own / scale, mean / scale)

    def see_others(self, sent: Tensor, mean: Tensor) -> None:
        """``mean`` over the ranks, where this one sent ``sent``; it is compared with what the others did to it."""
        others = mean - sent / self.group.size
        for name, value in (("_so", _dot(sent, others)), ("_ss", _dot(sent, sent)), ("_oo", _dot(others, others))):
            self._add(name, value)

    def _add(self, name: str, value: float) -> None:
        self._measured[name] = self._measured.get(name, 0.0) + value

    # --- steps -----------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Collective: tells the others, and takes everybody's weight."""
        observation = self._observation()
        signals = self.weighting.signals
        pairs = zip(signals, self._states, strict=True)
        self._states = [signal.update(state, observation) for signal, state in pairs]
        mine = Reading.pack([signal.read(state) for signal, state in zip(signals, self._states, strict=True)])
        tokens = torch.tensor([nan if observation.tokens is None else observation.tokens], dtype=torch.float64)
        message = torch.cat([mine.view(-1), tokens]).view(torch.uint8)
        parts = self.group.all_gather(message, [message.numel()] * self.group.size)
        told = [part.cpu().clone().view(torch.float64) for part in parts]
        self.readings = [Reading.unpack(one[:-1].view(len(signals), Reading.WIDTH)) for one in told]
        counts = [float(one[-1]) for one in told]
        said = None if all(count != count for count in counts) else counts
        self.weights, self._rule = self.weighting.weights(self.readings, said, self._rule)
        gain = float(self.weights[self.group.rank]) * self.group.size
        self.gain = 1.0 if abs(gain - 1.0) < 1e-9 else gain

    def end_step(self, *, good: bool) -> None:
        """What an undone step showed is not held against anybody: a GradScaler looks for overflows."""
        self._last = self._measured if good else {}
        self._measured = {}

    def _observation(self) -> Observation:
        said = {name: values for name, values in self._said.items() if values}
        facts = {name: sum(values) / len(values) for name, values in said.items()}
        if "tokens" in said:
            facts["tokens"] = sum(said["tokens"])
        seen = self._last
        facts.update({name: value for name, value in seen.items() if not name.startswith("_")})
        if "_so" in seen:
            size = (seen["_ss"] * seen["_oo"]) ** 0.5
            if size > 0:
                facts["agreement"] = seen["_so"] / size
        self._said = {name: [] for name in OBSERVABLE}
        self._last = {}
        return Observation(**facts)

    # --- saving ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Without the reference gradient, which is the caller's."""
        return {
            "weighting": repr(self.weighting),
            "signals": self._states,
            "rule": self._rule,
            "last": self._last,
            "previous": self._previous,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        MisuseError: It is of another weighting.
        """
        if state["weighting"] != repr(self.weighting):
            raise MisuseError(
                f"this state has the weighting {state['weighting']}, the exchange {self.weighting!r}; give the same"
            )
        self._states, self._rule = list(state["signals"]), state["rule"]
        self._last, self._previous = dict(state["last"]), dict(state["previous"])
        self._measured = {}


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.float(), b.float()))

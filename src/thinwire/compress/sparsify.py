"""Compressors that send few elements of an update, exactly or in fewer bits.

================  ==========================================================  ===================================
class             which elements                                              source
================  ==========================================================  ===================================
`TopK`            the k largest, exactly                                      Aji & Heafield 2017; Lin et al. 2018
`Threshold`       those above a threshold reused and refined between steps    Li & Hoefler 2022 (Ok-Topk)
`BlockTopK`       the blocks of largest norm                                  Vogels et al. 2019, baselines
`RandomK`         one per stratum, the same on all ranks; no indices travel   Stich et al. 2018
================  ==========================================================  ===================================

Their values go through any :class:`~thinwire.compress.values.ValueCodec`: ``TopK(0.01, values="bfloat16")``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from thinwire.compress.base import Compressor, Layout, Packet, State, check_density, check_update
from thinwire.compress.indices import pack, packed_size, unpack
from thinwire.compress.quantize import mixed_seed
from thinwire.compress.values import ValueCodec, value_codec
from thinwire.errors import MalformedError, MisuseError
from thinwire.tensors.select import accumulate_top_k, at_least, top_k

__all__ = ["BlockTopK", "RandomK", "Sparsifier", "Threshold", "TopK", "add_scaled", "all_finite", "expand_runs"]

_HEADER = 4  # bytes: a count, or RandomK's step


def add_scaled(update: Tensor, residual: Tensor, update_scale: float, residual_scale: float, out: Tensor) -> None:
    """``out = update_scale * update + residual_scale * residual``, each operation rounded to float32."""
    first = update if update_scale == 1.0 else update * update_scale
    second = residual if residual_scale == 1.0 else residual * residual_scale
    torch.add(first, second, out=out)


def all_finite(x: Tensor) -> bool:
    """Whether no element is infinite or NaN; one pass over memory, nothing allocated, unless the sum overflows."""
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())


@dataclass(frozen=True)
class Sparsifier(Compressor):
    """A compressor that says *which* elements travel; packing them is common to all."""

    density: float = 0.01
    values: str | ValueCodec = "float32"

    def __post_init__(self) -> None:
        check_density(self.density)
        object.__setattr__(self, "values", value_codec(self.values))  # equal choices get equal repr

    @property
    def codec(self) -> ValueCodec:
        return value_codec(self.values)

    @property
    def run(self) -> int:
        """Elements that are always sent together; positions are multiples of it, each with the run behind it."""
        return 1

    @property
    def synchronised(self) -> bool:
        """Whether all ranks select the same positions without talking to each other."""
        return False

    @property
    def by_parameter(self) -> bool:
        """Whether a state may say how many elements of each parameter are due."""
        return False

    def finite(self, update: Tensor, positions: Tensor) -> bool:
        """Whether all of ``update`` is finite, given what was selected from it."""
        del positions
        return all_finite(update)

    def count(self, numel: int) -> int:
        """Elements due of an update of ``numel``: at least one, so that every update makes some progress."""
        return min(numel, max(1, round(self.density * numel))) if numel else 0

    def at(self, density: float) -> Sparsifier:
        return replace(self, density=density)

    def init(self, layout: Layout, device: torch.device | str = "cpu") -> State:
        del device
        return {"numel": layout.numel, "offsets": list(layout.offsets), "step": 0, "seed": 0, "threshold": None}

    @abstractmethod
    def select(self, update: Tensor, state: State) -> tuple[Tensor, State]:
        """Positions to send, int32 ``[k]`` strictly increasing, and the next state."""

    def accumulate(
        self,
        update: Tensor,
        residual: Tensor,
        state: State,
        *,
        update_scale: float = 1.0,
        residual_scale: float = 1.0,
        out: Tensor | None = None,
    ) -> tuple[Tensor, bool, State]:
        """Writes ``update_scale * update + residual_scale * residual`` into ``out`` (default: ``residual``) and selects
        from it. Returns the positions, whether all of it is finite, and the next state."""
        out = residual if out is None else out
        add_scaled(update, residual, update_scale, residual_scale, out)
        if not all_finite(out):
            return torch.empty(0, dtype=torch.int32, device=out.device), False, state
        positions, state = self.select(out, state)
        return positions, True, state

    def encode(self, update: Tensor, state: State) -> tuple[Packet, State]:
        check_update(update)
        positions, after = self.select(update, state)
        header = torch.tensor([positions.numel()], dtype=torch.int32).view(torch.uint8).to(update.device)
        where = self.pack(positions, update.numel())
        what = self.codec.encode(update.index_select(0, positions), seed_of(state))
        return Packet(update.numel(), torch.cat([header, where, what])), after

    def decode(self, packet: Packet) -> Tensor:
        if packet.nbytes < _HEADER:
            raise MalformedError(f"a packet of {packet.nbytes} bytes has no room for its header")
        count = int(packet.data[:_HEADER].clone().view(torch.int32))
        if not 0 <= count <= packet.numel:
            raise MalformedError(f"{count} positions in an update of {packet.numel}", count=count)
        where = self.packed_size(count, packet.numel)
        if packet.nbytes != _HEADER + where + self.codec.size(count):
            raise MalformedError(f"a packet of {packet.nbytes} bytes is not one of {count} values", count=count)
        positions = self.unpack(packet.data[_HEADER : _HEADER + where], count, packet.numel)
        dense = torch.zeros(packet.numel, device=packet.data.device)
        dense[positions] = self.codec.decode(packet.data[_HEADER + where :], count)
        return dense

    # How positions travel; the all-reduce uses the same three for the slices that it sends.

    def packed_size(self, count: int, numel: int) -> int:
        return packed_size(-(-count // self.run), -(-numel // self.run))

    def pack(self, positions: Tensor, numel: int) -> Tensor:
        if self.run == 1:
            return pack(positions, numel)
        return pack(torch.unique_consecutive(positions // self.run), -(-numel // self.run))

    def unpack(self, data: Tensor, count: int, numel: int) -> Tensor:
        if self.run == 1:
            return unpack(data, count, numel)
        positions = expand_runs(unpack(data, -(-count // self.run), -(-numel // self.run)), self.run, numel)
        if positions.numel() != count:
            raise MalformedError(f"runs of {positions.numel()} positions where {count} are due", expected=count)
        return positions


def seed_of(state: State) -> int:
    """A seed that differs between ranks (``state["seed"]``) and between steps, for stochastic rounding."""
    return (int(state["seed"]) << 32) ^ int(state["step"])


def expand_runs(runs: Tensor, run: int, numel: int) -> Tensor:
    """Positions of the elements of whole runs, int32; the last run may be cut by ``numel``."""
    within = torch.arange(run, dtype=torch.int32, device=runs.device)
    positions = (runs.unsqueeze(1) * run + within).view(-1)
    return positions[positions < numel] if runs.numel() and (int(runs[-1]) + 1) * run > numel else positions


@final
@dataclass(frozen=True)
class TopK(Sparsifier):
    """The ``round(density * numel)`` elements of largest magnitude, exactly; of equal ones, those that come first.

    A state may carry ``counts``, how many elements of each parameter are due
    (:func:`thinwire.compress.budget.allocate`); without, the parameters of an update compete with each other.

    Raises:
        MisuseError: The density is outside (0, 1].

    >>> from thinwire.compress import Layout, TopK
    >>> compressor = TopK(density=0.5)
    >>> state = compressor.init(Layout(((4,),)))
    >>> packet, state = compressor.encode(torch.tensor([0.5, -3.0, 2.0, 1.0]), state)
    >>> compressor.decode(packet)
    tensor([ 0., -3.,  2.,  0.])
    """

    @property
    def by_parameter(self) -> bool:
        return True

    def finite(self, update: Tensor, positions: Tensor) -> bool:
        return all_finite(update.index_select(0, positions))  # NaN and infinity are selected before anything else

    def select(self, update: Tensor, state: State) -> tuple[Tensor, State]:
        if state.get("counts") is not None:
            return self._select_by_parameter(update, state)
        selection = top_k(update, self.count(update.numel()))
        return selection.indices, {**state, "step": state["step"] + 1}

    def accumulate(
        self,
        update: Tensor,
        residual: Tensor,
        state: State,
        *,
        update_scale: float = 1.0,
        residual_scale: float = 1.0,
        out: Tensor | None = None,
    ) -> tuple[Tensor, bool, State]:
        if state.get("counts") is not None:
            return super().accumulate(
                update, residual, state, update_scale=update_scale, residual_scale=residual_scale, out=out
            )
        selection = accumulate_top_k(
            update,
            residual,
            self.count(update.numel()),
            gradient_scale=update_scale,
            residual_scale=residual_scale,
            out=out,
        )
        if not selection.finite:
            return selection.indices[:0], False, state
        return selection.indices, True, {**state, "step": state["step"] + 1}

    @staticmethod
    def _select_by_parameter(update: Tensor, state: State) -> tuple[Tensor, State]:
        offsets = [*state["offsets"], update.numel()]
        chosen, thresholds = [], []
        for start, stop, count in zip(offsets[:-1], offsets[1:], state["counts"], strict=True):
            selection = top_k(update[start:stop], count)
            chosen.append(selection.indices + start)
            thresholds.append(selection.threshold)
        positions = torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int32, device=update.device)
        return positions, {**state, "step": state["step"] + 1, "thresholds": thresholds}


@final
@dataclass(frozen=True)
class Threshold(Sparsifier):
    """About ``density`` of the elements: those above a threshold that is found exactly every ``every`` steps and, in
    between, follows the number of elements it lets through. At most twice the count due is ever sent."""

    every: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise MisuseError(f"every={self.every}; the threshold must be found at least once, so give 1 or more")

    def select(self, update: Tensor, state: State) -> tuple[Tensor, State]:
        due = self.count(update.numel())
        after = {**state, "step": state["step"] + 1}
        if due and state["threshold"] and state["step"] % self.every:
            positions = at_least(update, state["threshold"])
            if due / 2 <= positions.numel() <= 2 * due:
                # Gradients have heavy tails: the count falls about as the threshold's cube around 1 %.
                return positions, {**after, "threshold": state["threshold"] * (positions.numel() / due) ** (1 / 3)}
        selection = top_k(update, due)
        return selection.indices, {**after, "threshold": selection.threshold}


@final
@dataclass(frozen=True)
class BlockTopK(Sparsifier):
    """The blocks of ``block`` neighbouring elements that have the largest Euclidean norm: one index a block."""

    block: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise MisuseError(f"block={self.block}; give 1 or more elements a block")

    @property
    def run(self) -> int:
        return self.block

    def select(self, update: Tensor, state: State) -> tuple[Tensor, State]:
        norms = block_norms(update, self.block)
        count = min(norms.numel(), -(-self.count(update.numel()) // self.block))
        positions = expand_runs(top_k(norms, count).indices, self.block, update.numel())
        return positions, {**state, "step": state["step"] + 1}


def block_norms(update: Tensor, block: int) -> Tensor:
    padded = torch.nn.functional.pad(update, (0, -update.numel() % block))
    norms: Tensor = torch.linalg.vector_norm(padded.view(-1, block), dim=1)
    return norms


@final
@dataclass(frozen=True)
class RandomK(Sparsifier):
    """One element at random in each of ``round(density * numel)`` equal strata, drawn from ``seed`` and the step.

    All ranks draw the same ones, so that no index travels and the values can be reduced as they stand."""

    seed: int = 0

    @property
    def synchronised(self) -> bool:
        return True

    def positions(self, numel: int, step: int) -> Tensor:
        count = self.count(numel)
        generator = torch.Generator().manual_seed(mixed_seed((self.seed << 32) ^ step))
        within = torch.rand(count, generator=generator, dtype=torch.float64)
        strata = (torch.arange(count, dtype=torch.float64) + within) * (numel / count) if count else within
        drawn = strata.floor().clamp_(max=numel - 1).to(torch.int32)
        return drawn[torch.cat([torch.ones(min(count, 1), dtype=torch.bool), drawn[1:] > drawn[:-1]])]

    def select(self, update: Tensor, state: State) -> tuple[Tensor, State]:
        positions = self.positions(update.numel(), state["step"]).to(update.device)
        return positions, {**state, "step": state["step"] + 1}

    def encode(self, update: Tensor, state: State) -> tuple[Packet, State]:
        check_update(update)
        positions, after = self.select(update, state)
        header = torch.tensor([state["step"]], dtype=torch.int32).view(torch.uint8).to(update.device)
        what = self.codec.encode(update[positions], seed_of(state))
        return Packet(update.numel(), torch.cat([header, what])), after

    def decode(self, packet: Packet) -> Tensor:
        if packet.nbytes < _HEADER:
            raise MalformedError(f"a packet of {packet.nbytes} bytes has no room for its header")
        step = int(packet.data[:_HEADER].clone().view(torch.int32))
        if step < 0:
            raise MalformedError(f"a packet of step {step}", step=step)
        positions = self.positions(packet.numel, step).to(packet.data.device)
        dense = torch.zeros(packet.numel, device=packet.data.device)
        dense[positions] = self.codec.decode(packet.data[_HEADER:], positions.numel())
        return dense

"""What an exchange keeps for one flat update between steps: residual, velocity, the compressor's state, the carry.

A *unit* is one DDP bucket, one FSDP parameter group, or any tensor a caller names. DDP forms its buckets anew after the
first step, so everything that belongs to an element is kept by parameter and moves with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import Any, final

import torch
from torch import Tensor

from thinwire.compress.allreduce import Credit
from thinwire.compress.base import Layout, State
from thinwire.compress.feedback import ErrorFeedback
from thinwire.errors import MisuseError

__all__ = ["Unit", "reshard"]


@final
@dataclass
class Unit:
    """``residual`` and ``velocity`` are float32 ``[numel]``; while a step may still be undone, ``undo`` holds the
    buffers from before it."""

    keys: tuple[str, ...]
    layout: Layout
    inner: State
    residual: Tensor | None = None
    velocity: Tensor | None = None
    learning_rates: tuple[float, ...] | None = None
    spare: dict[str, Tensor] = attribute(default_factory=dict)
    undo: dict[str, Any] = attribute(default_factory=dict)
    scores: tuple[float, ...] = ()
    mask: Tensor | None = None
    company: int = 0  # elements that travelled together with it last time, its own among them

    def begin(self, rollback: bool) -> None:
        """Before an exchange: with ``rollback``, remembers what it will change."""
        if rollback:
            self.undo = {"residual": self.residual, "velocity": self.velocity, "rates": self.learning_rates}

    def target(self, name: str) -> Tensor:
        """Where the next ``name`` (residual or velocity) is written: in place, or beside the one to go back to."""
        current: Tensor = getattr(self, name)
        if not self.undo:
            return current
        spare = self.spare.pop(name, None)
        return torch.empty_like(current) if spare is None else spare

    def revert(self) -> None:
        """Back to before the exchange, bit for bit."""
        if not self.undo:
            return
        for name in ("residual", "velocity"):
            before, now = self.undo[name], getattr(self, name)
            if now is not None and now is not before:
                self.spare[name] = now
            setattr(self, name, before)
        self.learning_rates = self.undo["rates"]
        self.undo = {}

    def commit(self) -> None:
        for name in ("residual", "velocity"):
            before = self.undo.get(name)
            if before is not None and before is not getattr(self, name):
                self.spare[name] = before
        self.undo = {}

    def set_aside(self, indices: Iterable[int]) -> list[tuple[str, int, Tensor]]:
        """Takes out what waits for these parameters, leaving zeros. Returns it for :meth:`put_back`."""
        taken = []
        for name in ("residual", "velocity"):
            flat = getattr(self, name)
            for i in indices if flat is not None else ():
                piece = torch.split(flat, list(self.layout.numels))[i]
                taken.append((name, i, piece.clone()))
                piece.zero_()
        return taken

    def put_back(self, taken: Iterable[tuple[str, int, Tensor]]) -> None:
        for name, i, waiting in taken:
            for flat in {id(f): f for f in (getattr(self, name), self.undo.get(name)) if f is not None}.values():
                torch.split(flat, list(self.layout.numels))[i].copy_(waiting)

    def settle(self, credits: Iterable[Credit], masking: bool) -> None:
        """Takes what was sent off the residual; where it was, the velocity is cleared (factor masking)."""
        for i, credit in enumerate(credits):
            if self.residual is not None:
                subtract_(self.residual, credit)
            if self.velocity is not None and masking and i == 0:
                sent = credit.values != 0
                if credit.positions is None:
                    self.velocity.masked_fill_(sent, 0.0)
                else:
                    self.velocity[credit.positions[sent]] = 0.0

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """By parameter: what to save, and what moves to other units when buckets are formed anew."""
        parts: dict[str, dict[str, Tensor]] = {key: {} for key in self.keys}
        for name in ("residual", "velocity"):
            flat = getattr(self, name)
            if flat is not None:
                for key, piece in zip(self.keys, torch.split(flat, list(self.layout.numels)), strict=True):
                    parts[key][name] = piece
        return parts


def subtract_(flat: Tensor, credit: Credit) -> None:
    if credit.positions is None:
        flat -= credit.values
    elif flat.device.type == "cpu":
        from thinwire.compress import loops

        loops.settle(flat.numpy(), credit.positions.numpy(), credit.values.numpy())
    else:
        flat[credit.positions] -= credit.values


def make_unit(
    keys: tuple[str, ...],
    layout: Layout,
    device: torch.device,
    feedback: ErrorFeedback | None,
    inner: State,
    known: dict[str, dict[str, Tensor]],
) -> Unit:
    """A unit whose buffers are filled from ``known`` (by parameter), and zero where nothing is known."""
    unit = Unit(keys, layout, inner)
    names = [] if feedback is None else ["residual", "velocity"] if feedback.momentum else ["residual"]
    for name in names:
        flat = torch.zeros(layout.numel, device=device)
        for key, piece in zip(keys, torch.split(flat, list(layout.numels)), strict=True):
            saved = known.get(key, {}).get(name)
            if saved is None:
                continue
            if saved.numel() != piece.numel():
                raise MisuseError(
                    f"the {name} kept for parameter {key} has {saved.numel()} elements, the parameter {piece.numel()}; "
                    "load the state of the same model, and attach() the exchange so that names are known",
                    parameter=key,
                )
            piece.copy_(saved.reshape(-1))
        setattr(unit, name, flat)
    return unit


def reshard(states: Sequence[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Every rank's state for another number of ranks, so that the mean residual stays what it was.

    Old ranks are laid end to end on a line, and so are the new ones; a new rank's residual is the mean of the old
    ones that it covers. What is not of one rank (schedule, link, borders of regions) starts anew where it depends on
    the number of ranks.
    """
    if not states or world_size < 1:
        raise MisuseError(f"{len(states)} states for {world_size} ranks; give the states of all old ranks")
    old = len(states)
    if sorted(state["rank"] for state in states) != list(range(old)) or any(s["world_size"] != old for s in states):
        found = [(state["rank"], state["world_size"]) for state in states]
        raise MisuseError(f"these are not the states of all ranks of one run, but of (rank, world size) {found}")
    states = sorted(states, key=lambda state: int(state["rank"]))
    if world_size == old:
        return list(states)
    return [_covering(states, rank, world_size) for rank in range(world_size)]


def _covering(states: Sequence[dict[str, Any]], rank: int, size: int) -> dict[str, Any]:
    old = len(states)
    shares = [max(0.0, min((rank + 1) / size, (i + 1) / old) - max(rank / size, i / old)) * size for i in range(old)]
    parameters: dict[str, dict[str, Tensor]] = {}
    for key, parts in states[0]["parameters"].items():
        parameters[key] = {
            name: sum((share * s["parameters"][key][name].double() for share, s in zip(shares, states, strict=True)),
                      start=torch.zeros((), dtype=torch.float64)).float()
            for name in parts
        }  # fmt: skip
    shared: dict[str, Any] = {"parameters": parameters, "units": [], "carries": [], "model": None, "aggregate": None}
    return {**states[0], "rank": rank, "world_size": size, **shared}

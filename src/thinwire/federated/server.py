"""The server: versions of a shared view of its model, and what each client lacks of them; updates in, once each.

The model that the server's optimiser holds is not the one that clients train: they hold the *view*, which follows it by
sparse deltas. What the view still lacks, ``model - view``, is the down-link's error feedback: it is kept by being the
difference, and each delta takes the largest of it. At an anchor the two are equal, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch

from thinwire.errors import MalformedError, MisuseError, UntrustedError, WrongBaseError
from thinwire.federated import frame as frames
from thinwire.federated.client import Orders, carried_over, pack
from thinwire.federated.model import ModelLayout, ModelState, is_finite
from thinwire.federated.selection import select

__all__ = ["Delivery", "DownLink", "UpLink", "load_state_dict", "state_dict"]


@final
@dataclass(frozen=True, slots=True)
class _Delta:
    version: int
    base: bytes
    data: bytes
    cells: frames.Positions | None
    """What it changed, for the union over several; None where data types changed, so that cells do not compare."""
    anchor: bool = False


@final
@dataclass(frozen=True, slots=True)
class Delivery:
    """What one client is sent: the payload, the digest of the model it leads to, and what the payload is."""

    data: bytes
    digest: bytes
    kind: str
    version: int


@final
@dataclass
class DownLink:
    """Publishes models; knows which version each client has said it holds.

    Args:
        density: share of the elements that a delta changes at most; 1 publishes the model bit for bit.
        values: how a delta's values travel.
        anchor_every: versions from one anchor to the next, at which clients' models equal the server's; 0 never.
        history_max: deltas that are kept for clients that lag behind; more cost an anchor.

    Raises:
        MisuseError: numbers out of range, unknown names.
    """

    density: float = 0.01
    values: str = "float16"
    layers: str = "global"
    anchor_every: int = 20
    history_max: int = 64
    version: int = 0
    view: ModelState | None = None
    model: ModelState | None = None
    held: dict[int, int] = field(default_factory=dict)
    deltas: list[_Delta] = field(default_factory=list)
    since_anchor: int = 0
    _made: dict[int, Delivery] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Orders(density=self.density, values=self.values, layers=self.layers)
        if self.anchor_every < 0 or self.history_max < 0:
            raise MisuseError("anchor_every and history_max count versions; give 0 or more")

    def publish(self, model: ModelState) -> bool:
        """Makes ``model`` the current one and moves the view towards it. False if nothing had changed.

        Raises:
            MisuseError: the model holds NaN or infinity; the version before stays.
        """
        if self.model is not None and self.model.digest == model.digest:
            return False
        before = self.view
        for (name, _, _), tensor in zip(model.layout.rows, model.tensors, strict=True):
            if not is_finite(tensor):
                raise MisuseError(f"the model to publish holds NaN or infinity in {name!r}; it diverged", name=name)
        due = self.anchor_every > 0 and self.since_anchor + 1 >= self.anchor_every
        exact = self.density >= 1 and self.values == "float32"
        if before is None or _shapes(before) != _shapes(model) or (due and before.layout != model.layout):
            self._restart(model)
        elif (due or exact) and before.layout == model.layout:
            self._exact(before, model, anchor=due)
        elif exact:
            self._restart(model)
        else:
            self._delta(before, model)
        self.model = model
        self._made.clear()
        return True

    def _restart(self, model: ModelState) -> None:
        """A model that nobody has, nor anything that leads to it."""
        self.version += 1
        self.view, self.since_anchor = model, 0
        self.deltas.clear()
        self.held.clear()

    def _exact(self, before: ModelState, model: ModelState, *, anchor: bool) -> None:
        cells = frames.changed_cells(model, before)
        data = frames.encode_cells(model, cells, sequence=self.version + 1, base=before.digest)
        self._step(model, _Delta(self.version + 1, before.digest, data, cells, anchor))

    def _delta(self, before: ModelState, model: ModelState) -> None:
        due, whole = model.minus(before), model.whole_since(before)
        positions = select(due, self.density, before, layers=self.layers)
        values = due[positions.long()]
        view = before.plus(positions, frames.rounded(values, self.values)).replaced(whole)
        data = frames.encode_sparse(
            positions, values, due.numel(), name=self.values, whole=whole,
            sequence=self.version + 1, base=before.digest, result=view.digest,
        )  # fmt: skip
        cells = frames.changed_cells(view, before) if view.layout == before.layout else None
        self._step(view, _Delta(self.version + 1, before.digest, data, cells))

    def _step(self, view: ModelState, delta: _Delta) -> None:
        self.version, self.view = delta.version, view
        self.since_anchor = 0 if delta.anchor else self.since_anchor + 1
        self.deltas.append(delta)
        del self.deltas[: -self.history_max or len(self.deltas)]

    def deliver(self, node: int) -> Delivery:
        """The cheapest way from the version that ``node`` holds to the current one.

        Raises:
            MisuseError: nothing has been published.
        """
        if self.view is None:
            raise MisuseError("publish a model before delivering it")
        at = self.held.get(node, -1)
        if at not in self._made:
            self._made[at] = self._way(at, self.view)
        return self._made[at]

    def _way(self, at: int, view: ModelState) -> Delivery:
        if at == self.version:
            return Delivery(b"", view.digest, "delta", self.version)
        ways = []
        missing = [delta for delta in self.deltas if delta.version > at]
        if at >= 0 and missing and missing[0].version == at + 1:
            kind = "anchor" if any(delta.anchor for delta in missing) else "delta"
            ways.append((kind, pack([delta.data for delta in missing])))
            cells = [delta.cells for delta in missing if delta.cells is not None]
            if 1 < len(missing) == len(cells):
                union = np.unique(np.concatenate(cells))
                data = frames.encode_cells(view, union, sequence=self.version, base=missing[0].base)
                ways.append((kind, pack([data])))
        if not ways or min(len(data) for _, data in ways) > view.layout.nbytes:
            ways.append(("anchor", pack([frames.encode_anchor(view, self.version)])))
        kind, data = min(ways, key=lambda way: len(way[1]))
        return Delivery(data, view.digest, kind, self.version)

    def holds(self, node: int, version: int) -> None:
        """``node`` has said that it holds ``version``."""
        if version == self.version or any(delta.version > version for delta in self.deltas):
            self.held[node] = max(version, self.held.get(node, -1))

    def lost(self, node: int) -> None:
        """What ``node`` holds is not known: it gets an anchor."""
        self.held.pop(node, None)


@final
@dataclass
class UpLink:
    """Takes each client's update once, and says which it took last.

    ``receive`` checks and decodes but changes nothing; ``accept`` makes it so, once the round has used the update.
    ``memories`` holds the EF21 memories, float32 ``[numel]`` a client that has ever sent.
    """

    accepted: dict[int, int] = field(default_factory=dict)
    memories: dict[int, tuple[ModelLayout, torch.Tensor]] = field(default_factory=dict)
    _due: dict[int, tuple[int, tuple[ModelLayout, torch.Tensor] | None]] = field(default_factory=dict)

    def receive(
        self, node: int, data: bytes, *, view: ModelState, model: ModelState, feedback: str = "residual"
    ) -> ModelState:
        """What ``node`` would have returned had it trained ``model`` instead of ``view``: ``model + update``.

        Raises:
            MalformedError: damaged, or of other shapes.
            UntrustedError: an update that was taken already.
            WrongBaseError: it was made from another model than the view.
        """
        part = frames.parse_frame(data)
        if part.sequence <= self.accepted.get(node, 0):
            raise UntrustedError(
                f"update {part.sequence} of client {node} comes again; it was taken already", node=node
            )
        if part.base != view.digest:
            raise WrongBaseError(f"client {node} updated another model than was sent; its update is stale", node=node)
        memory = None
        if part.kind in (frames.ANCHOR, frames.CELLS):
            trained = frames.decode_anchor(part) if part.kind == frames.ANCHOR else frames.decode_cells(part, view)
            if trained.digest != part.result or not all(is_finite(tensor) for tensor in trained.tensors):
                raise MalformedError("an exact update is not finite, or leads elsewhere than it says")
            trained.check_comparable(view)
            moved = trained if view.digest == model.digest else _shifted(model, trained, view)
        else:
            sparse = frames.decode_sparse(part, view.layout)
            if feedback == "ef21":
                memory = self.memory(node, view.layout).clone()
                memory[sparse.positions.long()] += sparse.values
                everywhere = torch.arange(memory.numel(), dtype=torch.int32)
                moved = model.plus(everywhere, memory).replaced(sparse.whole)
            else:
                moved = sparse.applied_to(model)
        self._due[node] = (part.sequence, memory if memory is None else (view.layout, memory))
        return moved

    def memory(self, node: int, layout: ModelLayout) -> torch.Tensor:
        """The EF21 memory of a client, float32 ``[numel]``; zeros before its first update."""
        if node not in self.memories:
            return torch.zeros(layout.numel)
        old, memory = self.memories[node]
        return carried_over(memory, old, layout)

    def accept(self, node: int) -> None:
        """The update last received from ``node`` has been used."""
        sequence, memory = self._due.pop(node)
        self.accepted[node] = sequence
        if memory is not None:
            self.memories[node] = memory

    def drop(self, node: int) -> None:
        """It has not been; its client will keep it."""
        self._due.pop(node, None)


def _shifted(model: ModelState, trained: ModelState, view: ModelState) -> ModelState:
    """``model + (trained - view)``, and exactly ``trained`` wherever model and view have the same bits."""
    update = trained.minus(view)
    everywhere = torch.arange(update.numel(), dtype=torch.int32)
    moved = model.plus(everywhere, update)
    tensors: dict[int, torch.Tensor] = {}
    for i, (new, old, mine) in enumerate(zip(trained.tensors, view.tensors, model.tensors, strict=True)):
        alike = i in view.layout.updated and new.dtype == old.dtype == mine.dtype
        tensors[i] = torch.where(old == mine, new, moved.tensors[i]) if alike else new
    return moved.replaced(tensors)


def _shapes(state: ModelState) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, _, shape in state.layout.rows]


def state_dict(down: DownLink, up: UpLink) -> Mapping[str, Any]:
    """All that a server keeps, as bytes, numbers and tensors that ``torch.save`` takes. Clients that lag behind get an
    anchor after it is loaded: the history of deltas is left out."""
    return {
        "version": down.version,
        "since_anchor": down.since_anchor,
        "view": None if down.view is None else frames.encode_anchor(down.view, down.version),
        "model": None if down.model is None else frames.encode_anchor(down.model, down.version),
        "held": {node: version for node, version in down.held.items() if version == down.version},
        "accepted": dict(up.accepted),
        "memories": {node: (layout.encode(), m.clone()) for node, (layout, m) in up.memories.items()},
    }


def load_state_dict(down: DownLink, up: UpLink, state: Mapping[str, Any]) -> None:
    """Inverse of :func:`state_dict`."""
    for name in ("view", "model"):
        data = state[name]
        setattr(down, name, None if data is None else frames.decode_anchor(frames.parse_frame(data)))
    down.version, down.since_anchor = state["version"], state["since_anchor"]
    down.held = dict(state["held"])
    down.deltas.clear()
    down._made.clear()
    up.accepted = dict(state["accepted"])
    up.memories = {node: (ModelLayout.parse(layout), m) for node, (layout, m) in state["memories"].items()}

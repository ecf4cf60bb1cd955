"""The client: a model that follows the server's, and error feedback that survives lost and refused updates.

A client *settles* before it sends again. An update that it sent is pending until the server says which update it took
last: if that one, what was sent leaves the residual; if not, the residual keeps it, bit for bit, as if nothing had been
sent. So no mass is lost, whoever vanishes.

==============  =========================================  =======================================================
feedback        what is sent                               source
==============  =========================================  =======================================================
``"residual"``  top-k of update + residual                 Seide et al. 2014; Stich et al. 2018 (arXiv:1809.07599)
``"ef21"``      top-k of update - memory; both sides add   Richtárik et al. 2021 (arXiv:2106.05203), algorithm 1
                it to their memory, which stands for the
                update
``"none"``      top-k of update; the rest is dropped       the baseline
==============  =========================================  =======================================================
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from thinwire.errors import MalformedError, MisuseError, UnsupportedError, WrongBaseError
from thinwire.federated import frame as frames
from thinwire.federated.model import ModelLayout, ModelState, is_finite
from thinwire.federated.selection import LAYERS, select
from thinwire.wire.cursor import Cursor, put_varint

__all__ = ["FEEDBACKS", "ClientState", "Orders", "carried_over", "follow", "pack", "send", "settle", "unpack"]

FEEDBACKS = ("none", "residual", "ef21")
_ORDERS = struct.Struct("<BBBBfI")
_DELTAS_MAX = 1 << 16


@final
@dataclass(frozen=True, slots=True)
class Orders:
    """What a client is told with each message, 12 bytes: how to code its update, and which it need not keep.

    ``accepted`` is the number of the client's last update that was taken. Raises MisuseError for unknown names.

    >>> Orders.parse(Orders(density=0.5, accepted=7).encode()).accepted
    7
    """

    density: float = 0.01
    values: str = "float16"
    feedback: str = "residual"
    layers: str = "global"
    accepted: int = 0

    def __post_init__(self) -> None:
        for what, name, known in (
            ("values", self.values, frames.VALUES),
            ("feedback", self.feedback, FEEDBACKS),
            ("layers", self.layers, LAYERS),
        ):
            if name not in known:
                raise MisuseError(f"{what}={name!r}; there are {', '.join(known)}", **{what: name})
        if not 0 < self.density <= 1:
            raise MisuseError(f"a density of {self.density}; give the share of elements to send, in (0, 1]")

    @property
    def exact(self) -> bool:
        """Whether everything is sent as it is: then models travel bit for bit."""
        return self.density >= 1 and self.values == "float32" and self.feedback != "ef21"

    def encode(self) -> bytes:
        return _ORDERS.pack(
            1,
            frames.VALUES.index(self.values),
            FEEDBACKS.index(self.feedback),
            LAYERS.index(self.layers),
            self.density,
            self.accepted,
        )

    @classmethod
    def parse(cls, data: bytes) -> Orders:
        """Raises MalformedError or UnsupportedError for bytes that are no orders."""
        if len(data) != _ORDERS.size:
            raise MalformedError(f"orders of {len(data)} bytes where {_ORDERS.size} are due")
        version, values, feedback, layers, density, accepted = _ORDERS.unpack(data)
        if version != 1 or values >= len(frames.VALUES) or feedback >= len(FEEDBACKS) or layers >= len(LAYERS):
            raise UnsupportedError("orders of an unknown version or with an unknown name; upgrade thinwire")
        if not 0 < density <= 1:
            raise MalformedError(f"orders to send a share of {density}")
        return cls(density, frames.VALUES[values], FEEDBACKS[feedback], LAYERS[layers], accepted)


@final
@dataclass(frozen=True, slots=True)
class ClientState:
    """All that a client keeps between rounds. ``carry`` is float32 ``[numel]``: with ``"residual"`` what was to be sent
    *before* the pending update was cut from it, with ``"ef21"`` the memory before it. ``pending`` is that update."""

    model: ModelState | None = None
    carry: Tensor | None = None
    pending: bytes = b""
    sequence: int = 0


def pack(parts: list[bytes]) -> bytes:
    """Frames as the payload of one message: each behind its length.

    >>> [bytes(part) for part in unpack(pack([b"a", b"", b"bc"]))]
    [b'a', b'', b'bc']
    """
    out = bytearray()
    for part in parts:
        put_varint(out, len(part))
        out += part
    return bytes(out)


def unpack(data: bytes) -> list[memoryview]:
    """Inverse of :func:`pack`. Raises MalformedError."""
    cursor = Cursor(memoryview(data), "a message")
    parts: list[memoryview] = []
    while cursor.at < len(cursor.data):
        if len(parts) == _DELTAS_MAX:
            raise MalformedError(f"a message of more than {_DELTAS_MAX} frames")
        parts.append(cursor.take(cursor.varint(1 << 40)))
    return parts


def follow(state: ClientState, data: bytes, digest: bytes) -> ClientState:
    """The state after the frames of a message that leads to the model of ``digest``; nothing changes on an error.

    Frames that lead to where the model is already are skipped, so it does no harm that a server knows less than is so.

    Raises:
        WrongBaseError: no way from the model at hand; ask for an anchor.
        MalformedError: damaged frames, or they lead elsewhere than they say.
    """
    model = state.model
    if model is not None and model.digest == digest:
        return state
    parts = [frames.parse_frame(part) for part in unpack(data)]
    first = 0
    for i, part in enumerate(parts):
        if part.kind == frames.ANCHOR or (model is not None and part.base == model.digest):
            first = i
    for part in parts[first:]:
        if part.kind == frames.ANCHOR:
            model = frames.decode_anchor(part)
        elif model is None:
            raise WrongBaseError("a change of a model that this client does not have; it needs an anchor")
        elif part.kind == frames.CELLS:
            model = frames.decode_cells(part, model)
        elif part.base != model.digest:
            raise WrongBaseError(
                "a change of another model than this client's; it needs an anchor",
                expected=part.base.hex(),
                actual=model.digest.hex(),
            )
        else:
            model = frames.decode_sparse(part, model.layout).applied_to(model)
    if model is None or model.digest != digest:
        raise WrongBaseError("the changes lead to another model than the server's; this client needs an anchor")
    carry = state.carry
    if carry is not None and state.model is not None:
        carry = carried_over(carry, state.model.layout, model.layout)
    return replace(state, model=model, carry=carry)


def carried_over(carry: Tensor, old: ModelLayout, new: ModelLayout) -> Tensor:
    """A flat vector of one layout as that of another: by name, for tensors of the same number of elements."""
    if carry.numel() == new.numel and old.updated == new.updated:
        return carry
    parts = dict(zip((old.rows[i][0] for i in old.updated), torch.split(carry, list(old.numels)), strict=True))
    found = [torch.zeros(0)]
    for i, numel in zip(new.updated, new.numels, strict=True):
        part = parts.get(new.rows[i][0])
        found.append(part if part is not None and part.numel() == numel else torch.zeros(numel))
    return torch.cat(found)


def settle(state: ClientState, orders: Orders) -> ClientState:
    """The state with no update pending: taken away from the residual (or put into the memory) if it was accepted."""
    sequence = max(state.sequence, orders.accepted)
    carry = state.carry
    if state.pending and carry is not None and state.model is not None:
        part = frames.parse_frame(state.pending)
        if part.sequence == orders.accepted:
            sent = frames.decode_sparse(part, state.model.layout)
            carry = carry.clone()
            at = sent.positions.long()
            carry[at] = carry[at] + sent.values if orders.feedback == "ef21" else carry[at] - sent.values
    return replace(state, carry=carry, pending=b"", sequence=sequence)


def send(state: ClientState, trained: ModelState, orders: Orders) -> tuple[bytes, ClientState]:
    """The update that leads from the client's model to ``trained``, as a frame, and the next state.

    ``state`` is settled (:func:`settle`).

    Raises:
        MisuseError: there is no model yet, or the update holds NaN or infinity; the state is as before.
        WrongBaseError: names, their order or shapes are not those of the client's model.

    Law: over any rounds, what was accepted and what is carried sum to all updates (``"residual"``; to rounding).

    >>> model = ModelState.of({"w": torch.zeros(4)})
    >>> trained = ModelState.of({"w": torch.tensor([1.0, 4.0, 2.0, 3.0])})
    >>> data, state = send(ClientState(model=model), trained, Orders(density=0.25))
    >>> settle(state, Orders(accepted=1)).carry, settle(state, Orders(accepted=0)).carry
    (tensor([1., 0., 2., 3.]), tensor([1., 4., 2., 3.]))
    """
    base = state.model
    if base is None:
        raise MisuseError("a client without a model has nothing to update; follow() first")
    number = state.sequence + 1
    update, whole = trained.minus(base), trained.whole_since(base)
    if not bool(update.isfinite().all()) or not all(is_finite(tensor) for tensor in whole.values()):
        raise MisuseError("the trained model holds NaN or infinity, or lies too far away; nothing is sent")
    carry = state.carry if orders.feedback != "none" else None
    if carry is not None and not bool(carry.any()):
        carry = None
    if orders.exact and carry is None:
        if trained.layout != base.layout:  # in other data types than they came in
            data = frames.encode_anchor(trained, number, base=base.digest)
        else:
            cells = np.arange(sum(base.layout.cells), dtype=np.uint32)
            data = frames.encode_cells(trained, cells, sequence=number, base=base.digest)
        return data, replace(state, carry=None, pending=b"", sequence=number)
    due = update if carry is None else update - carry if orders.feedback == "ef21" else update + carry
    positions = select(due, orders.density, base, layers=orders.layers)
    data = frames.encode_sparse(
        positions,
        due[positions.long()],
        update.numel(),
        name=orders.values,
        whole=whole,
        sequence=number,
        base=base.digest,
    )
    if orders.feedback == "none":
        return data, replace(state, carry=None, pending=b"", sequence=number)
    if orders.feedback == "ef21":
        due = torch.zeros_like(update) if carry is None else carry
    return data, replace(state, carry=due, pending=data, sequence=number)

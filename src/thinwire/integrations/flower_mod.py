"""The client's side of SparseSync: a Flower mod that unpacks models and packs updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import final

import numpy as np
import torch

from thinwire.errors import MalformedError, MisuseError, ThinwireError
from thinwire.federated import frame as frames
from thinwire.federated.client import ClientState, Orders, follow, send, settle
from thinwire.federated.model import DIGEST_BYTES
from thinwire.integrations import flower_records as records
from thinwire.integrations.flower_records import Array, ArrayRecord, Message, RecordDict

from flwr.app import Context  # isort: skip - after flower_records, which says what to install

__all__ = ["SparseSyncMod"]

STATE = "thinwire.sparse_sync"
SECAGG = "secaggplus_configs"


@final
class SparseSyncMod:
    """Put it first in a ClientApp's mods: ``ClientApp(mods=[SparseSyncMod(), ...])``. What to do comes from the server.

    The function that trains sees ordinary arrays and returns ordinary arrays. What was not sent waits in
    ``context.state``, on the client. Messages from a server without SparseSync pass untouched.

    Args:
        density_max: never sends a larger share than this, whatever the server asks for.
        bytes_max: nor more bytes than about this in one update, for clients that know their own link.

    Raises:
        MisuseError: a bound that is out of range; secure aggregation in the same app, whose masked sums need all
            clients to send the same positions.
    """

    def __init__(self, *, density_max: float = 1.0, bytes_max: int | None = None) -> None:
        if not 0 < density_max <= 1 or (bytes_max is not None and bytes_max < 1):
            raise MisuseError("density_max is a share in (0, 1], bytes_max a positive number of bytes")
        self.density_max = density_max
        self.bytes_max = bytes_max

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """Flower's interface of a mod."""
        content = message.content
        if SECAGG in content.config_records:
            raise MisuseError(
                "SparseSync cannot run below secure aggregation: masks cancel only where all clients send the same "
                "positions. Remove SparseSyncMod or the SecAgg+ mod"
            )
        if records.KEY not in content.config_records:
            return call_next(message, context)
        try:
            orders, name, state = self._receive(content, context)
        except ThinwireError as error:
            return records.error_reply(message, error)
        assert state.model is not None
        message.content = RecordDict(
            {
                key: records.record_of(state.model) if key == name else record
                for key, record in content.items()
                if key != records.KEY
            }
        )
        reply = call_next(message, context)  # if it raises, Flower keeps the context as it was, and so do we
        if reply.has_error() or records.category(message) != "train":
            _save(context, state)
            return reply
        return self._reply(message, reply, context, state, orders)

    def _receive(self, content: RecordDict, context: Context) -> tuple[Orders, str, ClientState]:
        data = content.config_records[records.KEY].get("o")
        if not isinstance(data, bytes) or len(data) <= DIGEST_BYTES:
            raise MalformedError("a message's orders are missing or too short")
        orders, digest = Orders.parse(data[:-DIGEST_BYTES]), data[-DIGEST_BYTES:]
        name = records.array_name(content)
        state = settle(_load(context), orders)
        try:
            return orders, name, follow(state, records.data_of(content.array_records[name]), digest)
        except ThinwireError:
            _save(context, state)  # what is settled stays so, even if this model cannot be followed
            raise

    def _reply(self, message: Message, reply: Message, context: Context, state: ClientState, orders: Orders) -> Message:
        try:
            name = records.array_name(reply.content)
            trained = records.model_of(reply.content.array_records[name])
            data, state = send(state, trained, self._bounded(orders, trained.layout.numel))
        except ThinwireError as error:
            _save(context, state)
            # not "lost": the client holds the model; it is its own answer that cannot be sent
            return records.error_reply(message, MalformedError(str(error)))
        _save(context, state)
        reply.content[name] = records.packed(data)
        return reply

    def _bounded(self, orders: Orders, numel: int) -> Orders:
        density = min(orders.density, self.density_max)
        if self.bytes_max is not None and numel:
            per_entry = 4.0 if orders.values == "float32" else 3.0
            density = min(density, max((self.bytes_max - frames.FRAME_OVERHEAD) / per_entry / numel, 1 / numel))
        return replace(orders, density=density)


def _save(context: Context, state: ClientState) -> None:
    record = {}
    for name, data in (
        ("model", b"" if state.model is None else frames.encode_anchor(state.model, state.sequence)),
        ("carry", b"" if state.carry is None else state.carry.numpy().tobytes()),
        ("pending", state.pending),
        ("sequence", state.sequence.to_bytes(4, "little")),
    ):
        record[name] = Array(dtype="uint8", shape=(len(data),), stype=records.STYPE, data=data)
    context.state[STATE] = ArrayRecord(record)


def _load(context: Context) -> ClientState:
    record = context.state.array_records.get(STATE)
    if record is None:
        return ClientState()
    model, carry, pending, sequence = (record[name].data for name in ("model", "carry", "pending", "sequence"))
    return ClientState(
        model=frames.decode_anchor(frames.parse_frame(model)) if model else None,
        carry=torch.from_numpy(np.frombuffer(carry, np.float32).copy()) if carry else None,
        pending=pending,
        sequence=int.from_bytes(sequence, "little"),
    )

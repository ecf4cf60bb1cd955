"""Compressors of the literature on Flower, for comparisons: the up-link alone; the model goes down whole.

A client's update is encoded by one of :mod:`thinwire.compress`, whose state (residuals, bases) it keeps in
``context.state``; the server decodes each update and gives the inner strategy full arrays. No version, no repair: a
client that is not heard keeps what it would have kept.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from thinwire.compress import Compressor, Layout, Packet
from thinwire.errors import MalformedError
from thinwire.federated.model import ModelState
from thinwire.integrations import flower_records as records

__all__ = ["Compressed", "CompressedMod"]

_STATE = "thinwire.baseline"


def _layout(model: ModelState) -> Layout:
    return Layout(tuple(tuple(model.tensors[i].shape) for i in model.layout.updated))


@final
@dataclass(frozen=True)
class CompressedMod:
    """The client's side: replaces the arrays of a reply by the packet of their difference from those received."""

    compressor: Compressor

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        if records.category(message) != "train":
            return call_next(message, context)
        before = records.model_of(message.content.array_records[records.array_name(message.content)])
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        name = records.array_name(reply.content)
        update = records.model_of(reply.content.array_records[name]).minus(before)
        kept = context.state.array_records.get(_STATE)
        state = _loads(records.data_of(kept)) if kept is not None else self.compressor.init(_layout(before))
        packet, state = self.compressor.encode(update, state)
        context.state[_STATE] = records.packed(_dumps(state))
        reply.content[name] = records.packed(packet.data.numpy().tobytes())
        return reply


def _dumps(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, pickle_module=pickle)
    return buffer.getvalue()


def _loads(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=False)  # this process wrote it
    return found


@final
class Compressed(Strategy):
    """The server's side, around any strategy."""

    def __init__(self, strategy: Strategy, compressor: Compressor) -> None:
        super().__init__()
        self.strategy, self.compressor = strategy, compressor
        self._model: ModelState | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages."""
        self._model = records.model_of(arrays)
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decodes every reply, and lets the inner strategy go on from full arrays."""
        received = list(replies)
        model = self._model
        assert model is not None
        everywhere = torch.arange(model.layout.numel, dtype=torch.int32)
        for reply in received:
            if reply.has_error():
                continue
            name = records.array_name(reply.content)
            data = torch.frombuffer(bytearray(records.data_of(reply.content.array_records[name])), dtype=torch.uint8)
            update = self.compressor.decode(Packet(model.layout.numel, data))
            if not bool(update.isfinite().all()):
                raise MalformedError("an update that is not finite")
            reply.content[name] = records.record_of(model.plus(everywhere, update))
        return self.strategy.aggregate_train(server_round, received)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The inner strategy's."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """The inner strategy's."""
        self.strategy.summary()

"""The server's side of SparseSync: a Flower strategy around any other, as Flower's own wrappers for privacy are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING, getLogger
from typing import Any, final

from thinwire.compress.schedule import Constant, Schedule, Signals
from thinwire.errors import MisuseError, ThinwireError, UntrustedError
from thinwire.federated import server
from thinwire.federated.client import Orders
from thinwire.federated.density import Bandwidths, affordable
from thinwire.federated.hierarchy import Hierarchy, Hop
from thinwire.federated.ledger import Ledger
from thinwire.federated.model import ModelState
from thinwire.integrations import flower_records as records
from thinwire.integrations.flower_hops import through_hops
from thinwire.integrations.flower_records import ArrayRecord, ConfigRecord, Message, RecordDict
from thinwire.integrations.flower_replies import check_metrics, weight_key

from flwr.app import MetricRecord  # isort: skip - after flower_records, which says what to install
from flwr.serverapp import Grid  # isort: skip
from flwr.serverapp import strategy as flower  # isort: skip

__all__ = ["SparseSync"]

_log = getLogger("flwr")
_DOWN = 5  # times as much goes down as up: the union of several clients' choices
_CLIENT_SIDE_PRIVACY = (
    flower.DifferentialPrivacyClientSideFixedClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
)


@final
@dataclass
class _Sent:
    """What one node has been sent in a phase."""

    version: int
    kind: str
    message: Message
    entries: float


@final
class SparseSync(flower.Strategy):
    """Sends sparse, versioned changes instead of models, in both directions, around any Flower ``strategy``.

    Clients run :class:`~thinwire.integrations.flower_mod.SparseSyncMod`. The inner strategy samples, aggregates and
    optimises as ever, on full arrays; with ``density=1, down_density=1, feedback="none", values="float32"`` it sees the
    very bits that it would without. What a round's update lacks waits in the client's residual, what the clients'
    models lack waits at the server; both are sent later. docs/federated.md tells the rest.

    Args:
        strategy: any strategy of ``flwr.serverapp.strategy`` on one ArrayRecord. Wrappers for server-side privacy go
            inside: ``SparseSync(DifferentialPrivacyServerSideFixedClipping(FedAvg(), ...))``.
        density: share of elements that a client sends, or a schedule of it (a step is a round).
        values: how values travel: float32, float16, bfloat16, int8, float8, sign.
        feedback: ``"residual"``, ``"ef21"`` or ``"none"``.
        layers: who shares the density: ``"global"``, ``"energy"``, ``"sensitivity"``, ``"even"``.
        down_density: share that a model's new version changes; by default five times the schedule's density.
        down_values: by default as ``values``.
        anchor_every: versions from one exact model to the next; 0 never.
        budget_bytes, budget_rounds: bytes for that many rounds, up and down; the density is lowered to keep to it.
        bandwidths: clients with slow links send less.
        hops: parents between clients and centre, played inside the ServerApp.
        loss_key: the metric of training that the schedule watches.

    Attributes:
        ledger: every byte, by round, hop, direction, client and kind.

    Raises:
        MisuseError: options that are out of range, or client-side privacy with what would break its bound.
    """

    def __init__(
        self,
        strategy: flower.Strategy,
        *,
        density: float | Schedule = 0.01,
        values: str = "float16",
        feedback: str = "residual",
        layers: str = "global",
        down_density: float | None = None,
        down_values: str | None = None,
        anchor_every: int = 20,
        budget_bytes: int | None = None,
        budget_rounds: int = 0,
        bandwidths: Bandwidths | None = None,
        hops: Sequence[Hop] = (),
        loss_key: str = "train_loss",
    ) -> None:
        super().__init__()
        if isinstance(strategy, SparseSync) or not isinstance(strategy, flower.Strategy):
            raise MisuseError(
                "SparseSync wraps one strategy of flwr.serverapp.strategy, which is not SparseSync itself"
            )
        self.strategy = strategy
        self.schedule = density if isinstance(density, Schedule) else Constant(density)
        self.orders = Orders(self.schedule.density(self.schedule.init()), values, feedback, layers)
        self._down_follows = down_density is None
        if down_density is None:
            down_density = min(1.0, _DOWN * self.orders.density)
        self.down = server.DownLink(down_density, down_values or values, layers, anchor_every)
        self.up = server.UpLink()
        if budget_bytes is not None and (budget_bytes < 1 or budget_rounds < 1):
            raise MisuseError("a budget needs budget_bytes and budget_rounds, both positive")
        self.budget_bytes, self.budget_rounds = budget_bytes, budget_rounds
        self.bandwidths = bandwidths or Bandwidths()
        self.hierarchy = Hierarchy(tuple(hops)) if hops else None
        self.loss_key = loss_key
        self.ledger = Ledger()
        self._state = self.schedule.init()
        self._round, self._rounds = 0, 0
        self._entries = 0.0  # that updates were to hold, to learn what one takes
        self._sent: dict[int, _Sent] = {}
        self._check_privacy()

    def _check_privacy(self) -> None:
        inner: Any = self.strategy
        while inner is not None:
            if isinstance(inner, _CLIENT_SIDE_PRIVACY) and (
                self.orders.feedback != "none" or self.orders.values != "float32" or self.hierarchy is not None
            ):
                raise MisuseError(
                    "client-side clipping bounds what a client sends, and error feedback or rounding would exceed the "
                    'bound; use feedback="none", values="float32" without hops, or server-side clipping'
                )
            inner = getattr(inner, "strategy", None)

    # --- down ------------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages, with what each client lacks instead of the model."""
        self._rounds += 1
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        return self._wrap(server_round, arrays, messages)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As :meth:`configure_train`; clients that evaluate a version need not be sent it again."""
        messages = list(self.strategy.configure_evaluate(server_round, arrays, config, grid))
        return self._wrap(server_round, arrays, messages)

    def _wrap(self, server_round: int, arrays: ArrayRecord, messages: list[Message]) -> list[Message]:
        self._round, self._sent = server_round, {}
        if not messages:
            return messages
        model = records.model_of(arrays)
        if not model.layout.numel:
            raise MisuseError("there are no floating-point arrays to synchronise; use the strategy without SparseSync")
        if self._down_follows:
            self.down.density = min(1.0, _DOWN * self.schedule.density(self._state))
        self.down.publish(model)
        for message in messages:
            name = records.array_name(message.content)
            if message.content[name] is not arrays and message.content[name] != arrays:
                raise MisuseError("the strategy sends other arrays than the global ones; SparseSync cannot carry them")
        density = self._density(model, [message.metadata.dst_node_id for message in messages])
        for message in messages:
            self._pack(message, arrays_name=records.array_name(message.content), density=density)
        return messages

    def _pack(self, message: Message, *, arrays_name: str, density: float) -> None:
        node = message.metadata.dst_node_id
        delivery = self.down.deliver(node)
        assert self.down.view is not None
        own = self.bandwidths.density(node, density, numel=self.down.view.layout.numel)
        orders = Orders(
            own, self.orders.values, self.orders.feedback, self.orders.layers, self.up.accepted.get(node, 0)
        )
        content = RecordDict(
            {
                key: records.packed(delivery.data) if key == arrays_name else record
                for key, record in message.content.items()
            }
        )
        content[records.KEY] = records.orders_record(orders.encode() + delivery.digest)
        message.content = content
        self._sent[node] = _Sent(delivery.version, delivery.kind, message, own * self.down.view.layout.numel)

    def _density(self, model: ModelState, nodes: Sequence[int]) -> float:
        density = self.schedule.density(self._state)
        if self.budget_bytes is None or not nodes:
            return density
        clients, last = len(nodes), self._round - 1
        down = sum(len(self.down.deliver(node).data) for node in nodes) / clients
        header = self.ledger.total(round=last, kind="header") / clients if last > 0 else 1500.0
        updates = self.ledger.total(kind="update") / max(1, self._entries)
        left = self.budget_bytes - self.ledger.total()
        return min(
            density,
            affordable(
                left,
                self.budget_rounds - self._rounds + 1,
                clients=clients,
                numel=model.layout.numel,
                fixed=down + header,
                per_entry=max(updates, 1.0) if self._entries else 4.0,
            ),
        )

    # --- up --------------------------------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Restores the replies to full arrays for the inner strategy; updates count as taken once it has used them."""
        received = list(replies)
        self._account(received)
        good: dict[int, ModelState] = {}
        usable: list[Message] = []
        for reply in received:
            restored = self._restored(reply, good)
            if isinstance(restored, ModelState):
                good[reply.metadata.src_node_id] = restored
            usable.append(reply if not isinstance(restored, Message) else restored)
        usable = check_metrics(usable, weight_key(self.strategy), _refuse)
        kept = {reply.metadata.src_node_id for reply in usable if not reply.has_error()}
        for node in set(good) - kept:
            self.up.drop(node)
        try:
            arrays, metrics = self._inner_aggregate(server_round, usable)
        except BaseException:
            for node in kept:
                self.up.drop(node)
            raise
        for node in kept:
            if arrays is None:
                self.up.drop(node)
            else:
                self.up.accept(node)
        loss = metrics.get(self.loss_key) if metrics is not None else None
        signal = float(loss) if isinstance(loss, int | float) else None
        self._state = self.schedule.observe(self._state, Signals(self._rounds - 1, loss=signal))
        return arrays, metrics

    def _inner_aggregate(
        self, server_round: int, usable: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if self.hierarchy is None:
            return self.strategy.aggregate_train(server_round, usable)
        assert self.down.model is not None
        before = dict(self.hierarchy.residuals)
        try:
            tops = through_hops(
                self.hierarchy,
                usable,
                self.down.model,
                weight_key(self.strategy),
                self.ledger,
                server_round,
                self._downs(),
            )
            arrays, metrics = self.strategy.aggregate_train(server_round, tops)
        except BaseException:
            self.hierarchy.residuals = before
            raise
        if arrays is None:
            self.hierarchy.residuals = before
        return arrays, metrics

    def _downs(self) -> dict[int, int]:
        return {node: records.payload_bytes(sent.message) for node, sent in self._sent.items()}

    def _restored(self, reply: Message, seen: Mapping[int, ModelState]) -> ModelState | Message | None:
        """A reply's arrays put in place (the model that they make), the reply as a failure, or None for failures."""
        node = reply.metadata.src_node_id
        sent = self._sent.get(node)
        if reply.has_error():
            if records.means_lost(reply):
                self.down.lost(node)
            return None
        try:
            if sent is None or node in seen:
                raise UntrustedError(f"client {node} answers twice, or what it was not asked", node=node)
            self.down.holds(node, sent.version)
            name = records.array_name(reply.content)
            assert self.down.view is not None
            assert self.down.model is not None
            restored = self.up.receive(
                node,
                records.data_of(reply.content.array_records[name]),
                view=self.down.view,
                model=self.down.model,
                feedback=self.orders.feedback,
            )
        except ThinwireError as error:
            return _refuse(reply, str(error))
        reply.content[name] = records.record_of(restored)
        self._entries += sent.entries
        return restored

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The inner strategy's, once it is noted who holds which version."""
        received = list(replies)
        self._account(received)
        for reply in received:
            sent = self._sent.get(reply.metadata.src_node_id)
            if records.means_lost(reply):
                self.down.lost(reply.metadata.src_node_id)
            elif sent is not None and not reply.has_error():
                self.down.holds(reply.metadata.src_node_id, sent.version)
        return self.strategy.aggregate_evaluate(server_round, received)

    # --- bytes, state ----------------------------------------------------------------------------------------------

    def _account(self, replies: Sequence[Message]) -> None:
        for node, sent in self._sent.items():
            self._note("down", node, sent.kind, sent.message)
        for reply in replies:
            self._note("up", reply.metadata.src_node_id, "update", reply)

    def _note(self, direction: str, node: int, kind: str, message: Message) -> None:
        ours, whole = records.payload_bytes(message), records.message_bytes(message)
        for what, nbytes in ((kind, ours), ("header", whole - ours)):
            self.ledger.add(self._round, "client", direction, node=node, kind=what, nbytes=nbytes)

    def state_dict(self) -> dict[str, Any]:
        """All that SparseSync keeps, for ``torch.save``; the inner strategy's state and the ledger are not in it."""
        hops = (
            {}
            if self.hierarchy is None
            else {"residuals": dict(self.hierarchy.residuals), "places": self.hierarchy.places}
        )
        return {**server.state_dict(self.down, self.up), "schedule": self._state, "rounds": self._rounds, "hops": hops}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, into a SparseSync of the same options."""
        server.load_state_dict(self.down, self.up, state)
        self._state, self._rounds = state["schedule"], state["rounds"]
        if self.hierarchy is not None:
            self.hierarchy.residuals = dict(state["hops"]["residuals"])
            self.hierarchy.places = dict(state["hops"]["places"])

    def summary(self) -> None:
        """Logs the options, and the inner strategy's."""
        up, down = self.orders, self.down
        _log.log(INFO, "\t├──> SparseSync:")
        _log.log(
            INFO,
            "\t│\t├── Up: density %g | %s | feedback %s | layers %s",
            up.density,
            up.values,
            up.feedback,
            up.layers,
        )
        _log.log(INFO, "\t│\t└── Down: density %g | %s | anchor every %d", down.density, down.values, down.anchor_every)
        self.strategy.summary()


def _refuse(reply: Message, reason: str) -> Message:
    _log.log(WARNING, "SparseSync goes on without client %d: %s", reply.metadata.src_node_id, reason)
    return records.refused(reply, reason)

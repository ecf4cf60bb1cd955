"""A Flower grid in one process: every message through Flower's own serialisation, clients in order, time and faults at
will. For tests and benches of hundreds of clients, where starting Ray would take longer than the work.

>>> from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
>>> from flwr.clientapp import ClientApp
>>> from flwr.serverapp.strategy import FedAvg
>>> import numpy as np
>>> app = ClientApp()
>>> @app.train()
... def train(message, context):
...     arrays = ArrayRecord([a + 1 for a in message.content["arrays"].to_numpy_ndarrays()])
...     return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)
>>> grid = LocalGrid(app, nodes=3)
>>> result = FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord([np.zeros(2, np.float32)]), num_rounds=2)
>>> result.arrays.to_numpy_ndarrays(), len(grid.log)
([array([2., 2.], dtype=float32)], 12)
"""

from __future__ import annotations

import heapq
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import Any, Protocol, final

from thinwire.errors import MisuseError
from thinwire.integrations.flower_records import Message, RecordDict

from flwr.app import Context, Error  # isort: skip - after flower_records, which says what to install
from flwr.clientapp import ClientApp  # isort: skip
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode  # isort: skip
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto  # isort: skip
from flwr.proto.message_pb2 import Context as ProtoContext  # isort: skip
from flwr.proto.message_pb2 import Message as ProtoMessage  # isort: skip
from flwr.serverapp import Grid  # isort: skip
from flwr.supercore.run import Run  # isort: skip
from flwr.supercore.task_identity import TaskIdentity  # isort: skip

__all__ = ["Fault", "LocalGrid", "Sent"]

RUN_ID = 1


@final
@dataclass(frozen=True, slots=True)
class Sent:
    """One message as it went over: node, ``down`` or ``up``, its type, bytes as serialised, and what became of it."""

    node: int
    direction: str
    message_type: str
    nbytes: int
    arrived: bool


class Fault(Protocol):
    """What may happen to a message's bytes on the way: returned as they are, changed, or None for lost; and a delay.

    ``turn`` counts the messages that the grid has carried. ``thinwire.testing.federated`` has some.
    """

    def __call__(self, node: int, direction: str, turn: int, data: bytes) -> bytes | None: ...


@final
class LocalGrid(Grid):
    """Runs ``client_app`` for each node, in order of the nodes' ids, when messages are pushed.

    A client that raises becomes an error reply and its context stays as it was, as in Flower. Two runs with the same
    apps and faults send the same bytes, up to the times that Flower writes into metadata.

    Args:
        client_app: a ClientApp, or ``"module:name"`` of one (needed with ``workers``).
        nodes: how many, or their ids (from 2 on).
        node_config: of the i-th node; by default ``partition-id`` and ``num-partitions`` as Flower's simulation sets.
        run_config: what ``context.run_config`` holds.
        faults: applied one after another to each message, both ways.
        seconds: how long a message of ``nbytes`` takes to or from a node, on a virtual clock; replies later than
            ``send_and_receive``'s timeout are lost, as in Flower.
        workers: processes that run clients side by side; contexts travel to them and back.

    Attributes:
        log: every message, as :class:`Sent`.
        contexts: the nodes' contexts.
        clock: virtual seconds so far.
    """

    def __init__(
        self,
        client_app: ClientApp | str,
        nodes: int | Sequence[int],
        *,
        node_config: Callable[[int], Mapping[str, Any]] | None = None,
        run_config: Mapping[str, Any] | None = None,
        faults: Sequence[Fault] = (),
        seconds: Callable[[int, int], float] | None = None,
        workers: int = 1,
    ) -> None:
        ids = list(range(2, nodes + 2)) if isinstance(nodes, int) else sorted(nodes)
        if not ids or ids[0] <= SUPERLINK_NODE_ID or len(set(ids)) != len(ids):
            raise MisuseError("nodes have different ids from 2 on (1 is the link itself)")
        if workers > 1 and not isinstance(client_app, str):
            raise MisuseError('give the ClientApp as "module:name" for other processes to import')
        self.client_app = client_app
        self.faults, self.seconds = tuple(faults), seconds or _at_once
        self.log: list[Sent] = []
        self.clock = 0.0
        self.contexts: dict[int, Context] = {}
        for i, node in enumerate(ids):
            config = {"partition-id": i, "num-partitions": len(ids)} if node_config is None else node_config(i)
            self.contexts[node] = Context(RUN_ID, node, dict(config), RecordDict(), dict(run_config or {}))
        self._run = Run.create_empty(RUN_ID)
        self._pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
        self._replies: dict[str, tuple[float, bytes]] = {}
        self._made = 0
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SUPERLINK_NODE_ID

    def close(self) -> None:
        """Ends the worker processes, if there are any."""
        if self._pool is not None:
            self._pool.shutdown()

    # --- Flower's interface ------------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Flower's runtime says which run this is."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message, as Flower's deprecated method makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in order."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Delivers the messages and runs the clients; replies wait to be pulled."""
        pushed: list[str] = []
        jobs: list[tuple[str, int, bytes]] = []
        for message in messages:
            node = message.metadata.dst_node_id
            self._made += 1
            number = f"{self._made:064x}"
            message.metadata.__dict__["_message_id"] = number
            pushed.append(number)
            data = message_to_proto(message).SerializeToString()
            arrived = self._carry(node, "down", message.metadata.message_type, data)
            if arrived is not None and node in self.contexts:
                jobs.append((number, node, arrived))
        jobs.sort(key=lambda job: (job[1], job[0]))
        for (number, node, down), up in zip(jobs, self._run_clients(jobs), strict=True):
            arrived = None if up is None else self._carry(node, "up", "", up)
            if arrived is not None:
                late = self.seconds(node, len(down)) + self.seconds(node, len(arrived))
                self._replies[number] = (self.clock + late, arrived)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these messages that have arrived by now."""
        return list(self._pull(message_ids, self.clock))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pushes, and pulls what arrives within ``timeout`` virtual seconds, in order of arrival."""
        pushed = list(self.push_messages(messages))
        ends = float("inf") if timeout is None else self.clock + timeout
        due = [self._replies[number][0] for number in pushed if number in self._replies]
        self.clock = max([self.clock, *(at for at in due if at <= ends)])
        return list(self._pull(pushed, self.clock))

    # --- how it runs -------------------------------------------------------------------------------------------------

    def _pull(self, message_ids: Iterable[str], by: float) -> Iterator[Message]:
        found = [(*self._replies[number], number) for number in message_ids if number in self._replies]
        ready = [(at, number, data) for at, data, number in found if at <= by]
        heapq.heapify(ready)
        while ready:
            _, number, data = heapq.heappop(ready)
            del self._replies[number]
            yield message_from_proto(ProtoMessage.FromString(data))

    def _carry(self, node: int, direction: str, message_type: str, data: bytes) -> bytes | None:
        arrived: bytes | None = data
        for fault in self.faults:
            if arrived is not None:
                arrived = fault(node, direction, len(self.log), arrived)
        self.log.append(Sent(node, direction, message_type, len(data), arrived is not None))
        return arrived

    def _run_clients(self, jobs: Sequence[tuple[str, int, bytes]]) -> Iterator[bytes | None]:
        if self._pool is None:
            app = _load(self.client_app)
            for _, node, data in jobs:
                reply, self.contexts[node] = _run_client(app, data, self.contexts[node])
                yield reply
            return
        packed = [context_to_proto(self.contexts[node]).SerializeToString() for _, node, _ in jobs]
        calls = [
            self._pool.submit(_in_worker, str(self.client_app), job[2], context)
            for job, context in zip(jobs, packed, strict=True)
        ]
        for (_, node, _), call in zip(jobs, calls, strict=True):
            reply, context = call.result()
            self.contexts[node] = context_from_proto(ProtoContext.FromString(context))
            yield reply


def _at_once(node: int, nbytes: int) -> float:
    del node, nbytes
    return 0.0


def _load(app: ClientApp | str) -> ClientApp:
    if isinstance(app, ClientApp):
        return app
    module, _, name = app.partition(":")
    loaded = getattr(import_module(module), name)
    if not isinstance(loaded, ClientApp):
        raise MisuseError(f"{app} is no ClientApp")
    return loaded


def _run_client(app: ClientApp, data: bytes, context: Context) -> tuple[bytes | None, Context]:
    """The reply's bytes and the context after it; None for a message that cannot be read, which Flower drops."""
    try:
        message = message_from_proto(ProtoMessage.FromString(data))
    except Exception:  # whatever Flower's serialisation raises on damaged bytes
        return None, context
    # Records are replaced, not written into, so that a shallow copy is what Flower's round trip gives.
    trial = Context(
        context.run_id, context.node_id, context.node_config, RecordDict(dict(context.state)), context.run_config
    )
    try:
        reply = app(message, trial)
    except Exception as error:
        trace = "".join(traceback.format_exception_only(error))
        reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, trace), reply_to=message)
        trial = context
    reply.metadata.__dict__["_message_id"] = "f" * 64
    return message_to_proto(reply).SerializeToString(), trial


def _in_worker(app: str, data: bytes, context: bytes) -> tuple[bytes | None, bytes]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SUPERLINK_NODE_ID
    reply, after = _run_client(_load(app), data, context_from_proto(ProtoContext.FromString(context)))
    return reply, context_to_proto(after).SerializeToString()

"""A hierarchy played inside a ServerApp: replies of clients in, one reply for each topmost parent out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from thinwire.errors import MisuseError
from thinwire.federated.hierarchy import Hierarchy
from thinwire.federated.ledger import Ledger
from thinwire.federated.model import ModelState
from thinwire.integrations import flower_records as records
from thinwire.integrations.flower_records import Message, RecordDict
from thinwire.integrations.flower_replies import metrics_of

from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords  # isort: skip

__all__ = ["through_hops"]


def through_hops(
    tree: Hierarchy,
    replies: list[Message],
    model: ModelState,
    key: str | None,
    ledger: Ledger,
    round_: int,
    downs: Mapping[int, int],
) -> list[Message]:
    """Replies of the parents below the centre, each with the weighted mean of its clients; failures stay as they are.

    The frames between parents are counted in ``ledger`` under ``hop`` ``edge0``, ``edge1``, ...; on the way down, each
    parent is sent once what its neediest client (``downs``, bytes by node) is sent.

    Raises:
        MisuseError: the strategy has no metric to weigh by.
    """
    if key is None:
        raise MisuseError("a hierarchy needs a strategy with weighted_by_key, such as FedAvg")
    failures = [reply for reply in replies if reply.has_error()]
    by_node = {reply.metadata.src_node_id: reply for reply in replies if not reply.has_error()}
    updates, restored = {}, {}
    for node, reply in by_node.items():
        name = records.array_name(reply.content)
        restored[node] = records.model_of(reply.content.array_records[name])
        updates[node] = (float(cast(float, metrics_of(reply)[key])), restored[node].minus(model))
    tops, sent = tree.up(updates)
    for level, parent, data in sent:
        ledger.add(round_, f"edge{level}", "up", node=parent, kind="update", nbytes=len(data))
    for level in range(len(tree.hops)):
        needs: dict[int, int] = {}
        for node, nbytes in downs.items():
            parent = tree.parent(level, node)
            needs[parent] = max(needs.get(parent, 0), nbytes)
        for parent, nbytes in needs.items():
            ledger.add(round_, f"edge{level}", "down", node=parent, kind="delta", nbytes=nbytes)
    made = []
    everywhere = torch.arange(model.layout.numel, dtype=torch.int32)
    for top in tops:
        first = by_node[top.nodes[0]]
        whole = restored[top.nodes[0]].whole_since(model)
        moved = model.plus(everywhere, (top.total / top.weight).float()).replaced(whole)
        metrics = aggregate_metricrecords([by_node[node].content for node in top.nodes], key)
        metrics[key] = top.weight
        metric_name = next(iter(first.content.metric_records))
        content = RecordDict({records.array_name(first.content): records.record_of(moved), metric_name: metrics})
        made.append(records.in_place_of(first, content))
    return [*made, *failures]

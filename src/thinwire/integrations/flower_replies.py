"""Metrics of replies, checked before a strategy trips over them: one client's nonsense must not end the round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import isfinite
from typing import Any

from thinwire.integrations.flower_records import Message

from flwr.app import MetricRecord  # isort: skip - after flower_records, which says what to install
from flwr.serverapp.strategy import Strategy  # isort: skip

__all__ = ["check_metrics", "metrics_of", "weight_key"]


def weight_key(strategy: Strategy) -> str | None:
    """The metric by which a strategy, or the one that it wraps, weighs replies; None if it has none."""
    inner: Any = strategy
    while inner is not None:
        key = getattr(inner, "weighted_by_key", None)
        if isinstance(key, str):
            return key
        inner = getattr(inner, "strategy", None)
    return None


def metrics_of(reply: Message) -> MetricRecord:
    """The one MetricRecord of a reply that has been checked."""
    found: MetricRecord = next(iter(reply.content.metric_records.values()))
    return found


def _fault(reply: Message, key: str | None) -> str | None:
    found = reply.content.metric_records
    if len(found) != 1:
        return f"{len(found)} MetricRecords; a reply has exactly one"
    if key is None:
        return None
    weight = metrics_of(reply).get(key)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight) or weight <= 0:
        return f"its weight {key!r} is {weight!r}, not a positive number"
    return None


def check_metrics(replies: list[Message], key: str | None, refuse: Callable[[Message, str], Message]) -> list[Message]:
    """The replies, those turned into failures whose metrics the others do not share, or whose weight is no weight."""
    checked = []
    for reply in replies:
        fault = None if reply.has_error() else _fault(reply, key)
        checked.append(reply if fault is None else refuse(reply, fault))
    kinds = Counter(_kind(reply) for reply in checked if not reply.has_error())
    if len(kinds) <= 1:
        return checked
    usual = kinds.most_common(1)[0][0]
    return [
        reply
        if reply.has_error() or _kind(reply) == usual
        else refuse(reply, "its records have other names than most clients'")
        for reply in checked
    ]


def _kind(reply: Message) -> tuple[Any, ...]:
    content = reply.content
    return (tuple(content.array_records), tuple(content.metric_records), tuple(sorted(metrics_of(reply))))

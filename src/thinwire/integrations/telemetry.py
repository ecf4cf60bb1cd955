"""Events of publishers and consumers as OpenTelemetry spans. The one file that imports opentelemetry, its API only.

A version that was published is a span ``thinwire.publish`` with children ``thinwire.publish.encode``, ``.upload``,
``.commit`` (and ``.base``); one that was applied is ``thinwire.apply`` with ``.fetch``, ``.decode``, ``.apply``,
``.verify`` (and ``.write``). They are made when the work is done, with the times it took, under the span that is then
current in its thread. Refusals and failing requests are spans of no length, with the status ERROR.

Without an SDK that the program sets up, OpenTelemetry's API does nothing, and so does this.
"""

from __future__ import annotations

from typing import Any

from thinwire.errors import MisuseError
from thinwire.sync.events import Applied, Event, Published, Refused, Retried

__all__ = ["Spans"]

_ATTRIBUTES = {
    Published: ("version", "step", "kind", "patch_bytes", "anchor_bytes", "total_bytes", "full_bytes", "changed",
                "elements"),
    Applied: ("version", "step", "path", "hops", "bytes_fetched", "changed"),
    Refused: ("kind", "version"),
    Retried: ("verb",),
}  # fmt: skip
_NAMES: dict[type, str] = {Published: "publish", Applied: "apply", Refused: "refused", Retried: "retried"}


class Spans:
    """An observer that makes spans.

    Args:
        provider: a ``TracerProvider``; the process's by default.

    Raises:
        MisuseError: opentelemetry-api is not installed.

    >>> import torch, thinwire
    >>> publisher = thinwire.Publisher("memory://doc-spans", observer=Spans())
    >>> publisher.publish(torch.nn.Linear(4, 4)).version
    1
    """

    def __init__(self, provider: Any = None) -> None:
        self._trace = _opentelemetry()
        self._tracer = self._trace.get_tracer("thinwire", tracer_provider=provider)

    def __call__(self, event: Event) -> None:
        """Make the spans of an event; looks (``Seen``) and fetches have none of their own."""
        name = _NAMES.get(type(event))
        if name is None:
            return
        values = {key: getattr(event, key) for key in _ATTRIBUTES[type(event)]}
        attributes = {f"thinwire.{key}": value for key, value in values.items() if value is not None}
        if isinstance(event, (Published, Applied)):
            self._work(f"thinwire.{name}", event, attributes)
        elif isinstance(event, (Refused, Retried)):
            span = self._tracer.start_span(f"thinwire.{name}", attributes=attributes)
            span.set_status(self._trace.StatusCode.ERROR, event.message)
            span.end()

    def _work(self, name: str, event: Published | Applied, attributes: dict[str, Any]) -> None:
        ends = [stage.began_ns + round(stage.seconds * 1e9) for stage in event.stages]
        began = min((stage.began_ns for stage in event.stages), default=None)
        parent = self._tracer.start_span(name, start_time=began, attributes=attributes)
        context = self._trace.set_span_in_context(parent)
        for stage, end in zip(event.stages, ends, strict=True):
            child = self._tracer.start_span(f"{name}.{stage.name}", context=context, start_time=stage.began_ns)
            child.end(end_time=end)
        parent.end(end_time=max(ends, default=None))


def _opentelemetry() -> Any:
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise MisuseError("spans need opentelemetry-api: pip install 'thinwire[watch]'") from error
    return trace

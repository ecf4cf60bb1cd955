"""What ``thinwire follow`` tells machines while it runs: lines of JSON on stderr, and metrics over HTTP."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from enum import StrEnum
from typing import Annotated, Any

import typer

from thinwire.cli.output import Output

__all__ = ["LogFormat", "LogFormatOption", "MetricsAddress", "MetricsPort", "watching"]

_LOG = "thinwire.follow"
_OURS = "thinwire_fields"


class LogFormat(StrEnum):
    """How messages on stderr look."""

    text = "text"
    json = "json"


LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="Of messages on stderr. json: one object a line, one line a version.")
]
MetricsPort = Annotated[
    int | None,
    typer.Option(min=1, max=65535, metavar="PORT", help="Serve Prometheus metrics at this port, such as 9108."),
]
MetricsAddress = Annotated[str, typer.Option(metavar="IP", help="And on this address; 0.0.0.0 is all of them.")]


class _JsonFormatter(logging.Formatter):
    """One object a line: ``time``, ``level``, ``logger``, ``message``, then the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for a record; no newline is in it."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _OURS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields_of(event: Any) -> dict[str, Any]:
    """An event as JSON: its class in lower case, its fields, stages as seconds by name."""
    found: dict[str, Any] = {"event": type(event).__name__.lower()}
    for field in fields(event):
        value = getattr(event, field.name)
        if field.name == "message":  # the line has one already
            continue
        found[field.name] = {s.name: round(s.seconds, 6) for s in value} if field.name == "stages" else value
    return found


def _log_event(event: Any) -> None:
    from thinwire.sync.events import Applied, Refused, Retried

    log = logging.getLogger(_LOG)
    if isinstance(event, Applied):
        log.info("version %d: %s", event.version, event.path, extra={_OURS: _fields_of(event)})
    elif isinstance(event, (Refused, Retried)):
        log.warning("%s", event.message, extra={_OURS: _fields_of(event)})


@contextmanager
def _logging(output: Output) -> Iterator[None]:
    """Everything on stderr as JSON, the library's own warnings too; what is printed for people goes the same way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger("thinwire")
    before = root.level, root.propagate
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False

    def log(level: int, text: str) -> None:  # stays usable for the error that ends the program
        handler.emit(logging.LogRecord(_LOG, level, __file__, 0, text, None, None))

    output.log = log
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.level, root.propagate = before


@contextmanager
def watching(
    output: Output, *, log_format: LogFormat, port: int | None, address: str
) -> Iterator[Callable[[Any], None] | None]:
    """An observer that does what the options say, while the ``with`` block runs; None where they say nothing.

    Raises:
        MisuseError: metrics are asked for and prometheus_client is not installed, or the port is taken.
    """
    observers: list[Callable[[Any], None]] = []
    with ExitStack() as stack:
        if log_format is LogFormat.json:
            stack.enter_context(_logging(output))
            observers.append(_log_event)
        if port is not None:
            from thinwire.integrations.metrics import Metrics

            metrics = Metrics()
            stack.callback(metrics.serve(port, address))
            observers.append(metrics)

        def tell_all(event: Any) -> None:
            from thinwire.sync.events import tell

            for observer in observers:
                tell(observer, event)

        yield tell_all if observers else None

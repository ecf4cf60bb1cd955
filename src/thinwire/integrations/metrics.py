"""Events of publishers and consumers as Prometheus metrics. The one file that imports prometheus_client.

Names and units follow Prometheus' conventions: base units, counters that end in ``_total``.

>>> metrics = Metrics()  # of a registry of its own; Metrics(prometheus_client.REGISTRY) adds to the process's
>>> from thinwire.sync.events import Seen
>>> metrics(Seen(newest=7, held=5))
>>> metrics.registry.get_sample_value("thinwire_lag_versions")
2.0
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from thinwire.errors import MisuseError
from thinwire.sync.events import Applied, Event, Fetched, Published, Refused, Retried, Seen

__all__ = ["METRICS", "SERVING", "Metric", "Metrics", "ServingMetrics"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: its name as queries see it (a histogram's without ``_bucket``), type, labels, and what it is."""

    name: str
    type: str
    labels: tuple[str, ...]
    help: str


METRICS = (
    Metric("thinwire_published_versions_total", "counter", ("kind",), "Versions committed, by kind."),
    Metric("thinwire_published_bytes_total", "counter", ("part",), "Bytes uploaded: delta, anchor, other."),
    Metric("thinwire_full_bytes_total", "counter", (), "Bytes that full checkpoints of these versions would have."),
    Metric("thinwire_publish_seconds", "histogram", ("stage",), "Time to publish a version, by stage and total."),
    Metric("thinwire_published_version", "gauge", (), "Version published last."),
    Metric("thinwire_changed_ratio", "gauge", (), "Share of elements that the version published last changed."),
    Metric("thinwire_fetched_bytes_total", "counter", (), "Bytes of patches and anchors fetched."),
    Metric("thinwire_applied_versions_total", "counter", ("path",), "Versions reached, by the way that led there."),
    Metric("thinwire_applied_patches_total", "counter", (), "Patches applied."),
    Metric("thinwire_apply_seconds", "histogram", ("stage",), "Time to reach a version, by stage and total."),
    Metric("thinwire_propagation_seconds", "histogram", (), "From a version's making until applied, by two clocks."),
    Metric("thinwire_version", "gauge", (), "Version held; 0 before the first."),
    Metric("thinwire_newest_version", "gauge", (), "Newest version seen in the store."),
    Metric("thinwire_lag_versions", "gauge", (), "Versions that the one held is behind the newest seen."),
    Metric("thinwire_last_applied_timestamp_seconds", "gauge", (), "When a version was reached last, since the epoch."),
    Metric("thinwire_refusals_total", "counter", ("kind",), "Inputs refused or not to be had, by the error's class."),
    Metric("thinwire_request_failures_total", "counter", ("verb",), "Requests to the store that failed, by verb."),
)
"""Every metric of publishers and consumers."""

SERVING = (
    Metric("thinwire_requests_total", "counter", ("path", "code"), "Requests answered, by path and HTTP status."),
    Metric("thinwire_request_seconds", "histogram", ("path",), "Time to answer a request, the queue included."),
    Metric("thinwire_generated_tokens_total", "counter", (), "Tokens generated."),
    Metric("thinwire_queue_length", "gauge", (), "Requests that wait."),
    Metric("thinwire_pause_seconds", "histogram", (), "Time for which a change of version held requests up."),
)
"""And those of ``thinwire serve``."""

_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class Metrics:
    """An observer that counts. One may serve several publishers and consumers; gauges then show the last to report.

    Args:
        registry: where to register; a new ``CollectorRegistry`` by default. Metrics that no event has touched show only
            if they have no labels, as 0.

    Raises:
        MisuseError: prometheus_client is not installed, or the registry already has metrics of these names.
    """

    def __init__(self, registry: Any = None) -> None:
        prometheus = _prometheus()
        self.registry = prometheus.CollectorRegistry() if registry is None else registry
        self._of = _made(METRICS, self.registry)
        self._held = self._newest = 0

    def __call__(self, event: Event) -> None:
        """Count an event."""
        handle: Callable[[Any], None] = getattr(self, f"_{type(event).__name__.lower()}")
        handle(event)

    def _published(self, event: Published) -> None:
        self._of["thinwire_published_versions_total"].labels(event.kind).inc()
        other = event.total_bytes - event.patch_bytes - event.anchor_bytes
        for part, size in (("delta", event.patch_bytes), ("anchor", event.anchor_bytes), ("other", other)):
            self._of["thinwire_published_bytes_total"].labels(part).inc(size)
        self._of["thinwire_full_bytes_total"].inc(event.full_bytes)
        self._observe("thinwire_publish_seconds", event)
        self._of["thinwire_published_version"].set(event.version)
        self._of["thinwire_changed_ratio"].set(event.changed / max(event.elements, 1))

    def _observe(self, name: str, event: Published | Applied) -> None:
        for stage in event.stages:
            self._of[name].labels(stage.name).observe(stage.seconds)
        self._of[name].labels("total").observe(event.seconds)

    def _seen(self, event: Seen) -> None:
        self._place(event.held, event.newest)

    def _fetched(self, event: Fetched) -> None:
        self._of["thinwire_fetched_bytes_total"].inc(event.bytes)

    def _applied(self, event: Applied) -> None:
        now_s = time.time()
        self._of["thinwire_applied_versions_total"].labels(event.path).inc()
        self._of["thinwire_applied_patches_total"].inc(event.hops)
        self._observe("thinwire_apply_seconds", event)
        if event.created_ms is not None and event.path != "held":  # a restart says nothing of how long it took
            self._of["thinwire_propagation_seconds"].observe(max(now_s - event.created_ms / 1000, 0.0))
        self._of["thinwire_last_applied_timestamp_seconds"].set(now_s)
        self._place(event.version, max(self._newest, event.version))

    def _place(self, held: int, newest: int) -> None:
        self._held, self._newest = held, newest
        self._of["thinwire_version"].set(held)
        self._of["thinwire_newest_version"].set(newest)
        self._of["thinwire_lag_versions"].set(newest - held)

    def _refused(self, event: Refused) -> None:
        self._of["thinwire_refusals_total"].labels(event.kind).inc()

    def _retried(self, event: Retried) -> None:
        self._of["thinwire_request_failures_total"].labels(event.verb).inc()

    def serve(self, port: int, address: str = "127.0.0.1") -> Callable[[], None]:
        """Serve ``/metrics`` over HTTP from a thread of its own; call what is returned to stop.

        There is no access control: whoever reaches the port reads the metrics. Port 0 is refused, as nobody would know
        where to look.

        Raises:
            MisuseError: the port cannot be had.
        """
        if not 0 < port < 65536:
            raise MisuseError(f"a port is a number from 1 to 65535, not {port}")
        try:
            server, thread = _prometheus().start_http_server(port, addr=address, registry=self.registry)
        except OSError as error:
            raise MisuseError(f"metrics cannot be served on {address} port {port}: {error}", port=port) from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop


class ServingMetrics:
    """What a server counts of its requests, in the registry of a :class:`Metrics`.

    Raises:
        MisuseError: the registry has these metrics already.

    >>> counted = ServingMetrics(Metrics().registry)
    >>> counted.request("/v1/completions", 200, 0.5)
    >>> b'thinwire_requests_total{code="200",path="/v1/completions"} 1.0' in counted.text()
    True
    """

    def __init__(self, registry: Any) -> None:
        self.registry = registry
        self._of = _made(SERVING, registry)

    def request(self, path: str, code: int, seconds: float) -> None:
        """Count a request. ``path`` must be one of few."""
        self._of["thinwire_requests_total"].labels(path, str(code)).inc()
        self._of["thinwire_request_seconds"].labels(path).observe(seconds)

    def generated(self, tokens: int, waiting: int) -> None:
        """Count tokens, and tell the queue's length."""
        self._of["thinwire_generated_tokens_total"].inc(tokens)
        self._of["thinwire_queue_length"].set(waiting)

    def paused(self, seconds: float) -> None:
        """Count a change of version."""
        self._of["thinwire_pause_seconds"].observe(seconds)

    def text(self) -> bytes:
        """The registry in Prometheus' text format."""
        found: bytes = _prometheus().generate_latest(self.registry)
        return found


def _made(metrics: Sequence[Metric], registry: Any) -> dict[str, Any]:
    prometheus = _prometheus()
    found: dict[str, Any] = {}
    try:
        for metric in metrics:
            how: dict[str, Any] = {"registry": registry}
            if metric.type == "histogram":
                how["buckets"] = _BUCKETS
            make = getattr(prometheus, metric.type.capitalize())
            found[metric.name] = make(metric.name.removesuffix("_total"), metric.help, metric.labels, **how)
    except ValueError as error:
        raise MisuseError(
            f"the registry has thinwire's metrics already; make one Metrics a registry ({error})"
        ) from error
    return found


def _prometheus() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise MisuseError("metrics need prometheus_client: pip install 'thinwire[watch]'") from error
    return prometheus_client

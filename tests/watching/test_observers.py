"""What publishers and consumers tell: as often and as much as happens, and nothing that an observer does harms them."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import time
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from tests.cli.tools import command, environment, thinwire
from thinwire import Consumer, Publisher
from thinwire.errors import MisuseError, RetryError, StoreUnavailableError
from thinwire.integrations.metrics import METRICS, Metrics
from thinwire.integrations.telemetry import Spans
from thinwire.stores.local import LocalStore
from thinwire.stores.memory import MemoryStore
from thinwire.sync.events import Applied, Event, Fetched, Published, Refused, Retried, Seen

ROOT = Path(__file__).resolve().parents[2]


def model(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((64,), value), "b": torch.zeros(8)}


def run(store: Any, observe: Any, versions: int = 3, **how: Any) -> tuple[list[Any], list[Any]]:
    """Publish and follow one after another; the reports and the results."""
    publisher = Publisher(store, observer=observe, threads=1, **how)
    consumer = Consumer(store, observer=observe, threads=1)
    served, reports, results = model(0.0), [], []
    for k in range(versions):
        reports.append(publisher.publish(model(float(k)), step=k))
        if not results:
            results.append(consumer.load(served))
        else:
            version = consumer.poll()
            assert version is not None
            results.append(version.apply(served))
    assert consumer.poll() is None
    publisher.close()
    return reports, results


def of(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


# --- events --------------------------------------------------------------------------------------------------------


def test_events_are_what_the_reports_say() -> None:
    events: list[Event] = []
    reports, results = run(MemoryStore(), events.append)
    told, applied = of(events, Published), of(events, Applied)
    assert [(e.version, e.step, e.kind, e.patch_bytes, e.total_bytes, e.changed) for e in told] == [
        (r.version, r.step, r.kind, r.patch_bytes, r.total_bytes, r.changed) for r in reports
    ]
    assert [(e.version, e.step, e.path, e.hops, e.bytes_fetched, e.changed) for e in applied] == [
        (r.version, r.step, r.path, r.hops, r.bytes_fetched, r.changed) for r in results
    ]
    assert sum(e.bytes for e in of(events, Fetched)) == sum(r.bytes_fetched for r in results)
    assert [(e.newest, e.held) for e in of(events, Seen)] == [(1, 0), (2, 1), (3, 2), (3, 3)]
    for event, report in zip(told, reports, strict=True):
        assert {s.name: s.seconds for s in event.stages} | {"total": event.seconds} == dict(report.seconds)
    for event in (*told, *applied):
        ends = [(s.began_ns, s.began_ns + s.seconds * 1e9) for s in event.stages]
        assert [began for began, _ in ends] == sorted(began for began, _ in ends)
        assert all(a[1] <= b[0] + 1e6 for a, b in pairwise(ends))
    assert [stage.name for stage in applied[0].stages][:4] == ["fetch", "decode", "apply", "verify"]


def test_with_and_without_an_observer_the_same_bytes_are_written() -> None:
    def written(observe: Any) -> list[tuple[str, int]]:
        store = MemoryStore()
        run(store, observe)
        return [(re.sub(r"-[0-9a-f]{12}/", "/", info.key), info.size) for info in store.list("objects/")]

    assert written(None) == written(lambda event: None)


def test_an_observer_that_fails_is_logged_and_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("no disk for metrics")

    with caplog.at_level(logging.WARNING, logger="thinwire"):
        _, results = run(MemoryStore(), broken)
    assert [r.version for r in results] == [1, 2, 3]
    assert "no disk for metrics" in caplog.text


def test_refusals_are_told_and_raised_as_before(tmp_path: Path) -> None:
    events: list[Event] = []
    publisher = Publisher(str(tmp_path / "s"), anchor_ratio=100, threads=1)
    publisher.publish(model(0.0))
    consumer = Consumer(str(tmp_path / "s"), observer=events.append, threads=1)
    served = model(0.0)
    consumer.load(served)
    publisher.publish(model(1.0))
    next((tmp_path / "s").glob("objects/0000000002-*/delta*")).unlink()
    version = consumer.poll()
    assert version is not None
    with pytest.raises(Exception, match="version 2"):
        version.apply(served)
    assert [e.kind for e in of(events, Refused)] == ["NoPathError"]
    assert torch.equal(served["w"], model(0.0)["w"])


class _Flaky(LocalStore):
    """Fails the first times of each verb."""

    left = 3

    def get(self, key: str, *, size_max: int) -> bytes:
        if self.left:
            self.left -= 1
            raise StoreUnavailableError("try later")
        return super().get(key, size_max=size_max)


def test_failing_requests_are_told_one_by_one(tmp_path: Path) -> None:
    Publisher(str(tmp_path / "s"), threads=1).publish(model(0.0))
    events: list[Event] = []
    consumer = Consumer(_Flaky(tmp_path / "s"), observer=events.append, threads=1)
    assert consumer.load(model(1.0)).version == 1
    assert [e.verb for e in of(events, Retried)] == ["get"] * 3
    always = _Flaky(tmp_path / "s")
    always.left = 10**9
    events.clear()
    with pytest.raises(RetryError):
        Consumer(always, observer=events.append, retry_s=0.0).load(model(1.0))
    assert len(of(events, Retried)) == 1


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_are_sums_of_the_reports(tmp_path: Path) -> None:
    metrics = Metrics()
    before = time.time()
    reports, results = run(MemoryStore(), metrics, anchor_every=2)

    def value(name: str, **labels: str) -> float:
        found = metrics.registry.get_sample_value(name, labels)
        assert found is not None, (name, labels)
        return float(found)

    for kind in {r.kind for r in reports}:
        assert value("thinwire_published_versions_total", kind=kind) == [r.kind for r in reports].count(kind)
    assert value("thinwire_published_bytes_total", part="delta") == sum(r.patch_bytes for r in reports)
    assert value("thinwire_published_bytes_total", part="anchor") == sum(r.anchor_bytes for r in reports)
    parts = ("delta", "anchor", "other")
    assert sum(value("thinwire_published_bytes_total", part=p) for p in parts) == sum(r.total_bytes for r in reports)
    assert value("thinwire_full_bytes_total") == sum(r.full_bytes for r in reports)
    assert value("thinwire_fetched_bytes_total") == sum(r.bytes_fetched for r in results)
    assert value("thinwire_applied_patches_total") == sum(r.hops for r in results)
    for stage in ("encode", "upload", "commit", "total"):
        assert value("thinwire_publish_seconds_count", stage=stage) == 3
        assert value("thinwire_publish_seconds_sum", stage=stage) == pytest.approx(
            sum(r.seconds[stage] for r in reports)
        )
    assert value("thinwire_apply_seconds_count", stage="total") == 3
    assert value("thinwire_propagation_seconds_count") == 3
    assert (value("thinwire_version"), value("thinwire_newest_version"), value("thinwire_lag_versions")) == (3, 3, 0)
    assert value("thinwire_changed_ratio") == reports[-1].density
    assert value("thinwire_last_applied_timestamp_seconds") >= before


def test_every_metric_is_named_as_it_is_listed_and_touched_by_some_event() -> None:
    metrics = Metrics()
    run(MemoryStore(), metrics)
    metrics(Refused("NoPathError", "x", None))
    metrics(Retried("get", "x"))
    found = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    for metric in METRICS:
        assert metric.name + ("_count" if metric.type == "histogram" else "") in found, metric.name
        assert metric.name.endswith("_total") == (metric.type == "counter")
        family = [f for f in metrics.registry.collect() if f.name == metric.name.removesuffix("_total")]
        labels = {key for sample in family[0].samples for key in sample.labels}
        assert labels - {"le"} == set(metric.labels)


def test_a_registry_takes_them_once() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(MisuseError, match="one Metrics a registry"):
        Metrics(registry)


def test_the_dashboard_asks_for_metrics_that_exist_and_the_docs_list_them_all() -> None:
    dashboard = json.loads((ROOT / "examples/watching/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    known = {m.name: m for m in METRICS}
    samples = {m.name for m in METRICS if m.type != "histogram"}
    samples |= {f"{m.name}{end}" for m in METRICS if m.type == "histogram" for end in ("_bucket", "_sum", "_count")}
    used = {name for query in queries for name in re.findall(r"thinwire_\w+", query)}
    assert used <= samples, used - samples
    assert {n for name in used if (n := re.sub(r"_(bucket|sum|count)$", "", name)) in known} | {
        name for name in used if name in known
    } >= set(known) - {"thinwire_applied_patches_total", "thinwire_published_versions_total"}
    for query in queries:
        assert query.count("(") == query.count(")")
        for name, labels in re.findall(r"(thinwire_\w+)\{([^}]*)\}", query):
            metric = known[name if name in known else re.sub(r"_(bucket|sum|count)$", "", name)]
            assert set(re.findall(r"(\w+)[=!]", labels)) <= {*metric.labels, "instance"}
        for names in re.findall(r"by \(([^)]*)\)", query):
            metric_names = re.findall(r"thinwire_\w+", query)
            allowed = {label for n in metric_names for label in (known.get(n) or known[n.rsplit("_", 1)[0]]).labels}
            assert set(names.split(", ")) <= allowed | {"le"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    page = (ROOT / "docs/watching.md").read_text()
    rows = re.findall(r"^\| `(thinwire_\w+)` \| (\w+) \|([^|]*)\| ([^|]*) \|$", page, re.MULTILINE)
    assert [(name, kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows] == [
        (m.name, m.type, m.labels, m.help) for m in METRICS
    ]


# --- spans ---------------------------------------------------------------------------------------------------------


def test_spans_nest_and_last_as_long_as_the_stages() -> None:
    exporter, provider, events = InMemorySpanExporter(), TracerProvider(), []
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = Spans(provider)

    def both(event: Event) -> None:
        events.append(event)
        spans(event)

    with provider.get_tracer("test").start_as_current_span("step") as outer:
        run(MemoryStore(), both)
        spans(Refused("NoPathError", "no way", 3))
    found = exporter.get_finished_spans()
    works = [e for e in events if isinstance(e, (Published, Applied))]
    parents = [s for s in found if s.name in ("thinwire.publish", "thinwire.apply")]
    assert len(parents) == len(works) == 6
    for parent, event in zip(parents, works, strict=True):
        assert parent.parent.span_id == outer.get_span_context().span_id
        assert parent.attributes["thinwire.version"] == event.version
        children = [s for s in found if s.parent is not None and s.parent.span_id == parent.context.span_id]
        assert [s.name for s in children] == [f"{parent.name}.{stage.name}" for stage in event.stages]
        for child, stage in zip(children, event.stages, strict=True):
            assert (child.end_time - child.start_time) == round(stage.seconds * 1e9)
            assert parent.start_time <= child.start_time <= child.end_time <= parent.end_time
    (bad,) = [s for s in found if s.name == "thinwire.refused"]
    assert (bad.status.is_ok, bad.status.description) == (False, "no way")
    Spans()(works[0])  # without an SDK nothing happens


# --- the command ---------------------------------------------------------------------------------------------------


def test_follow_logs_one_line_of_json_a_version(tmp_path: Path) -> None:
    publisher = Publisher(str(tmp_path / "s"), anchor_ratio=100, threads=1)
    publisher.publish(model(0.0), step=7)
    result = thinwire("follow", "s", "-o", "d", "--once", "--log-format", "json", "--json")
    (line,) = [json.loads(text) for text in result.err.splitlines()]
    update = json.loads(result.out)
    assert {key: line[key] for key in ("version", "step", "path", "hops", "bytes_fetched")} == {
        key: update[key] for key in ("version", "step", "path", "hops", "bytes_fetched")
    }
    assert (line["event"], line["level"], line["logger"]) == ("applied", "info", "thinwire.follow")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    documented = (ROOT / "docs/watching.md").read_text()
    assert all(f"| `{key}` |" in documented for key in line), set(line)
    publisher.publish(model(1.0), step=8)
    next((tmp_path / "s").glob("objects/0000000002-*/delta*")).unlink()
    result = thinwire("follow", "s", "-o", "d", "--once", "--log-format", "json", code=4)
    lines = [json.loads(text) for text in result.err.splitlines()]
    assert [(x["level"], x.get("event")) for x in lines][-2:] == [("warning", "refused"), ("error", None)]
    assert not logging.getLogger("thinwire").handlers


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_follow_serves_metrics_while_it_runs(tmp_path: Path) -> None:
    publisher = Publisher(str(tmp_path / "s"), threads=1)
    publisher.publish(model(0.0))
    port = _free_port()
    words = command("follow", "s", "-o", "d", "--metrics-port", port, "--timeout", "100s")
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline, text = time.monotonic() + 60, ""
        while "thinwire_version 1.0" not in text and time.monotonic() < deadline and process.poll() is None:
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
            except OSError:
                time.sleep(0.1)
        assert "thinwire_version 1.0" in text
        assert re.search(r"^thinwire_fetched_bytes_total [1-9]", text, re.MULTILINE)
        with pytest.raises(MisuseError, match="cannot be served"):
            Metrics().serve(port)
    finally:
        process.terminate()
        process.communicate(timeout=30)
    stop = Metrics().serve(port)
    stop()

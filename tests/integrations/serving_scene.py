"""A generation server that follows a store, as its tests need it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import thinwire
from tests.integrations.tiny_model import model_of
from thinwire.integrations.generation import Generator
from thinwire.integrations.served import load_served
from thinwire.stores.memory import MemoryStore

pytest.importorskip("transformers")
pytest.importorskip("prometheus_client")

from thinwire.integrations.metrics import Metrics, ServingMetrics
from thinwire.integrations.serving import Server

PROMPT = [5, 6, 7]


def wait_until(true: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    """Ask again and again until it is ``true``; an AssertionError if it does not become so."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, f"not true within {timeout_s:g} s"
        time.sleep(0.02)


class Scene:
    """A store, its publisher, and a server that follows."""

    def __init__(self, folder: Path, store: Any, **settings: Any) -> None:
        self.store = store
        self.publisher = thinwire.Publisher(store)
        self.models = {1: model_of(1)}
        self.publisher.publish(self.models[1], step=10)
        self.registry = Metrics()
        counted = ServingMetrics(self.registry.registry)
        queue_max = settings.pop("queue_max", 64)
        self.served = load_served(folder, store)
        self.generator = Generator(
            self.served, store, poll_s=0.02, queue_max=queue_max, observer=self.registry,
            on_swap=lambda swap: counted.paused(swap.pause_s), retry_s=0.1,
        )  # fmt: skip
        self.generator.start()
        self.server = Server(self.generator, port=0, name="tiny", metrics=counted, **settings)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def publish(self) -> int:
        version = len(self.models) + 1
        self.models[version] = model_of(version)
        return self.publisher.publish(self.models[version], step=version * 10).version

    def until(self, version: int) -> dict[str, Any]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = self.get("/healthz")
            if found["thinwire"]["version"] >= version:
                return found
            time.sleep(0.02)
        raise AssertionError(f"version {version} was not reached: {found}")

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        kind = reply.headers.get("Content-Type", "")
        return reply.status, json.loads(text) if "json" in kind else text.decode(), dict(reply.headers)

    def get(self, path: str) -> Any:
        return self.ask("GET", path)[1]

    def post(self, body: Any, path: str = "/v1/completions") -> Any:
        code, found, _ = self.ask("POST", path, body)
        assert code == 200, found
        return found

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        self.generator.close()


@contextmanager
def scene(folder: Path, store: Any = None, **settings: Any) -> Iterator[Scene]:
    made = Scene(folder, store or MemoryStore(), **settings)
    try:
        yield made
    finally:
        made.close()

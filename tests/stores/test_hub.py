"""``hf://``: the Hugging Face Hub through its own fsspec file system, as far as it goes without the Hub."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("fsspec")

import torch

import thinwire
from thinwire.errors import ObjectNotFoundError, RetryError, StoreUnavailableError, ThinwireError, UnsafeStoreError
from thinwire.stores import enforces_create, open_store

URLS = ["hf://datasets/me/weights/run", "hf://buckets/me/weights/run", "hf://me/model/run"]


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[int]]]:
    """A server that answers every request with the status in the list, as the Hub does when it refuses."""
    status = [404]

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = b'{"error": "no"}'
            self.send_response(status[0])
            if status[0] == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", status
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("url", URLS)
def test_a_hub_url_opens_the_hubs_file_system_and_promises_no_atomic_create(url: str) -> None:
    store = open_store(url, endpoint="http://127.0.0.1:9")
    assert store.url == url
    assert type(store._files).__name__ == "HfFileSystem"  # type: ignore[attr-defined]
    assert store._root == url.removeprefix("hf://")  # type: ignore[attr-defined]
    assert not enforces_create(store)
    with pytest.raises(UnsafeStoreError, match="single_publisher=True"):
        thinwire.Publisher(store).publish(torch.nn.Linear(2, 2))
    with pytest.raises(StoreUnavailableError, match="try again"):
        store.get("latest.json", size_max=9)
    with pytest.raises(RetryError):
        thinwire.Publisher(store, single_publisher=True, retry_s=0.0).publish(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("url", URLS)
def test_what_the_hub_refuses_is_told_by_remedy(url: str, endpoint: tuple[str, list[int]]) -> None:
    where, status = endpoint
    store = open_store(url, endpoint=where, token="hf_secret")
    with pytest.raises(ObjectNotFoundError):
        store.get("latest.json", size_max=9)
    status[0] = 400
    with pytest.raises(ThinwireError) as found:
        store.get("latest.json", size_max=9)
    assert "hf_secret" not in str(found.value) + store.url

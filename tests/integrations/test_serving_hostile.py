"""The generation server against bad requests, slow clients, crowds and failures: each is refused, and it goes on."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.serving_scene import PROMPT, Scene, scene
from tests.integrations.tiny_model import save_folder
from thinwire.integrations.generation import BusyError, Request

pytest.importorskip("transformers")
pytest.importorskip("prometheus_client")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def serving(folder: Path) -> Iterator[Scene]:
    with scene(folder) as made:
        yield made


BAD: list[tuple[Any, str]] = [
    (b"", "no JSON"),
    (b"[1]", "JSON object"),
    (b"[" * 100_000, "no JSON"),
    (b'{"prompt": NaN}', "prompt"),
    ({}, "prompt"),
    ({"prompt": ""}, "one token"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [[1], []]}, "one token"),
    ({"prompt": [20]}, "ids below 20"),
    ({"prompt": [-1]}, "ids below 20"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "w2", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "w2", "max_tokens": 10**9}, "max_tokens"),
    ({"prompt": "w2", "max_tokens": 2.5}, "max_tokens"),
    ({"prompt": "w2", "max_tokens": 64}, "more than the model reads"),
    ({"prompt": "w2 " * 64}, "shorten"),
    ({"prompt": ["w2"] * 65}, "up to 64"),
    ({"prompt": "w2", "n": 129}, "n must be"),
    ({"prompt": ["w2"] * 64, "n": 3}, "more than 128"),
    ({"prompt": "w2", "temperature": -1}, "temperature"),
    ({"prompt": "w2", "temperature": "hot"}, "temperature"),
    (b'{"prompt": "w2", "temperature": Infinity}', "temperature"),
    (b'{"prompt": "w2", "top_p": NaN}', "top_p"),
    ({"prompt": "w2", "stop": ["x"] * 9}, "stop"),
    ({"prompt": "w2", "stop": [""]}, "stop"),
    ({"prompt": "w2", "stop": "x" * 257}, "stop"),
    ({"prompt": "w2", "seed": 2**70}, "seed"),
    ({"prompt": "w2", "stream": 1}, "stream"),
    ({"prompt": "w2", "logprobs": 5}, "logprobs"),
    ({"prompt": "w2", "echo": True}, "echo"),
    ({"prompt": "w2", "logit_bias": {"3": 100}}, "logit_bias"),
    ({"prompt": "w2", "temprature": 0}, "temprature"),
    ({"prompt": "w2", "model": 3}, "model"),
]


@pytest.mark.parametrize(("body", "said"), BAD, ids=range(len(BAD)))
def test_a_bad_request_is_refused_with_its_reason(serving: Scene, body: Any, said: str) -> None:
    code, found, _ = serving.ask("POST", "/v1/completions", body)
    assert code == 400
    assert said in found["error"]["message"]
    assert found["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [None, [], "hi", ["hi"], [{"role": "user"}], [{"role": "root", "content": "w2"}],
     [{"role": "tool", "content": "w2"}], [{"role": "user", "content": [{"type": "image"}]}],
     [{"role": "user", "content": "w2 " * 70}]],
)  # fmt: skip
def test_bad_conversations_are_refused(serving: Scene, messages: Any) -> None:
    assert serving.ask("POST", "/v1/chat/completions", {"messages": messages})[0] == 400


def test_other_paths_and_methods(serving: Scene) -> None:
    assert serving.ask("GET", "/")[0] == 404
    assert serving.ask("GET", "/v1/completions")[0] == 405
    assert serving.ask("POST", "/v1/embeddings", {})[0] == 404
    assert serving.ask("DELETE", "/v1/models")[0] == 501
    assert serving.ask("GET", "/../../etc/passwd")[0] == 404


def raw(here: Scene, data: bytes, *, hold: bool = False, timeout_s: float = 30) -> bytes:
    with socket.create_connection(("127.0.0.1", here.server.server_port), timeout=timeout_s) as connection:
        connection.sendall(data)
        if not hold:
            connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def test_what_is_no_http_or_too_large_is_cut_off_and_the_server_goes_on(folder: Path) -> None:
    with scene(folder, read_timeout_s=0.3, body_bytes_max=2000) as here:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
        assert b" 400 " in raw(here, b"\x16\x03\x01\x00nonsense\r\n\r\n")
        assert b" 414 " in raw(here, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")
        assert b" 431 " in raw(here, head + b"".join(b"X%d: y\r\n" % k for k in range(200)) + b"\r\n")
        assert b" 413 " in raw(here, head + b"Content-Length: 2001\r\n\r\n")
        assert b" 411 " in raw(here, head + b"\r\n")
        assert b" 411 " in raw(here, head + b"Content-Length: -5\r\n\r\n")
        assert b" 411 " in raw(here, head + b"Content-Length: 9" + b"9" * 30 + b"\r\n\r\n")
        assert b" 411 " in raw(here, head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        assert raw(here, head + b"Content-Length: 50\r\n\r\nhalf") == b""  # the client ended early
        assert raw(here, head + b"Content-Length: 50\r\n\r\nslow", hold=True) == b""  # and this one never ends
        assert raw(here, b"GET /healthz HT", hold=True) == b""
        assert here.post({"prompt": PROMPT, "max_tokens": 1})["thinwire"]["version"] == 1


def test_a_connection_serves_several_requests_and_connections_are_bounded(folder: Path) -> None:
    with scene(folder, connections_max=2) as here:
        connection = http.client.HTTPConnection("127.0.0.1", here.server.server_port, timeout=30)
        for _ in range(3):
            connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT, "max_tokens": 1}))
            assert json.loads(connection.getresponse().read())["thinwire"]["version"] == 1
        with socket.create_connection(("127.0.0.1", here.server.server_port)):
            time.sleep(0.2)
            assert raw(here, b"", hold=True).startswith(b"HTTP/1.1 503")
        connection.close()


def test_a_key_is_asked_for_if_there_is_one(folder: Path) -> None:
    with scene(folder, api_key="sesame") as here:
        body = {"prompt": PROMPT, "max_tokens": 1}
        for header in (
            {},
            {"Authorization": "sesame"},
            {"Authorization": "Bearer sesam"},
            {"Authorization": "Bearer \xe9"},
        ):
            code, found, headers = here.ask("POST", "/v1/completions", body, **header)
            assert (code, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert here.ask("POST", "/v1/completions", body, Authorization="Bearer sesame")[0] == 200
        assert here.ask("GET", "/metrics")[0] == 401
        assert here.ask("GET", "/healthz")[0] == 200
        assert "sesame" not in json.dumps(found)


class Slow:
    """Holds the generator up until it is let go."""

    def __init__(self, here: Scene) -> None:
        self.inner, self.go, self.begun = here.served.model.generate, threading.Event(), threading.Event()
        here.served.model.generate = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.begun.set()
        assert self.go.wait(60)
        return self.inner(*args, **kwargs)


def test_a_full_queue_refuses_and_time_runs_out_in_it(folder: Path) -> None:
    with scene(folder, queue_max=1, timeout_s=1.0) as here:
        slow = Slow(here)
        body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        codes: list[Any] = []
        threads = [threading.Thread(target=lambda: codes.append(here.ask("POST", "/v1/completions", body)))]
        threads[0].start()
        assert slow.begun.wait(30)
        threads.append(threading.Thread(target=lambda: codes.append(here.ask("POST", "/v1/completions", body))))
        threads[1].start()
        while here.generator.waiting < 1:
            time.sleep(0.01)
        code, _, headers = here.ask("POST", "/v1/completions", body)
        assert (code, headers["Retry-After"]) == (429, "1")
        with pytest.raises(BusyError):
            here.generator.submit(Request(((5,),)))
        time.sleep(1.1)
        slow.go.set()
        for thread in threads:
            thread.join(60)
        assert sorted(code for code, _, _ in codes) == [200, 504]  # the first was late, too, but had begun
        (late,) = [found for code, found, _ in codes if code == 200]
        assert late["choices"][0]["finish_reason"] == "timeout"
        assert late["usage"]["completion_tokens"] < 40


def test_a_client_that_goes_away_is_not_answered_any_further(folder: Path) -> None:
    with scene(folder) as here:
        slow = Slow(here)
        data = json.dumps({"prompt": PROMPT, "max_tokens": 60, "temperature": 0}).encode()
        with socket.create_connection(("127.0.0.1", here.server.server_port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
            assert slow.begun.wait(30)
        time.sleep(0.3)
        slow.go.set()
        assert here.post({"prompt": PROMPT, "max_tokens": 1})["usage"]["completion_tokens"] == 1
        assert here.generator.tokens_made < 10


def test_a_request_that_fails_inside_does_not_take_the_server_with_it(folder: Path) -> None:
    with scene(folder) as here:
        inner, here.served.model.generate = here.served.model.generate, None
        code, found, _ = here.ask("POST", "/v1/completions", {"prompt": PROMPT})
        assert (code, found["error"]["type"]) == (500, "server_error")
        assert "NoneType" not in json.dumps(found)
        here.served.model.generate = inner
        assert here.post({"prompt": PROMPT, "max_tokens": 1})

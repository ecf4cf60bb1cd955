"""The generation server: every answer is the one of a fresh model of the version that it names; hostile clients."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import thinwire
from tests.integrations.tiny_model import WORDS, greedy, model_of, save_folder
from thinwire.errors import MisuseError, StoreUnavailableError
from thinwire.integrations.generation import BusyError, Generator, Request
from thinwire.integrations.served import load_served
from thinwire.stores.memory import MemoryStore

pytest.importorskip("transformers")
pytest.importorskip("prometheus_client")

from thinwire.integrations.metrics import SERVING, Metrics, ServingMetrics
from thinwire.integrations.serving import Server

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


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


@pytest.fixture(scope="module")
def serving(folder: Path) -> Iterator[Scene]:
    with scene(folder) as made:
        yield made


PROMPT = [5, 6, 7]


def test_each_version_answers_as_a_fresh_model_does_and_says_its_name(folder: Path) -> None:
    with scene(folder) as here:
        for version in (1, 2, 3):
            if version > 1:
                here.publish()
                health = here.until(version)
                assert health["status"] == "ok"
                assert health["pause_s"] < 60
            code, found, headers = here.ask(
                "POST",
                "/v1/completions",
                {"prompt": PROMPT, "max_tokens": 9, "temperature": 0, "return_token_ids": True},
            )
            assert code == 200
            assert found["choices"][0]["token_ids"] == greedy(here.models[version], PROMPT, 9)
            assert found["thinwire"]["version"] == version
            assert found["thinwire"]["step"] == version * 10
            assert found["thinwire"]["digest"].startswith(found["system_fingerprint"])
            assert headers["X-Thinwire-Version"] == str(version)
            assert headers["X-Thinwire-Digest"] == found["thinwire"]["digest"]
        end = time.monotonic() + 30
        while here.get("/healthz")["proved"] < 3 and time.monotonic() < end:
            time.sleep(0.02)
        assert here.get("/healthz")["proved"] == 3  # compared with the published bits while nobody asked
        assert here.get("/v1/models")["data"][0]["thinwire"]["version"] == 3
        text = here.get("/metrics")
        assert 'thinwire_requests_total{code="200",path="/v1/completions"} 3.0' in text
        assert "thinwire_version 3.0" in text
        assert "thinwire_pause_seconds_count 3.0" in text


def test_many_clients_while_versions_change_no_answer_mixes_two(folder: Path) -> None:
    with scene(folder) as here:
        found: list[Any] = []
        stop = threading.Event()

        def client(k: int) -> None:
            while not stop.is_set():
                body = {"prompt": [PROMPT, [k + 2, 3]], "max_tokens": 6, "temperature": 0, "return_token_ids": True}
                found.append(here.post(body))

        threads = [threading.Thread(target=client, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            here.until(here.publish())
        stop.set()
        for thread in threads:
            thread.join()
        seen = set()
        expected: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for answer in found:
            version = answer["thinwire"]["version"]
            seen.add(version)
            for choice in answer["choices"]:
                key = version, tuple(choice["prompt_token_ids"])
                if key not in expected:
                    expected[key] = greedy(here.models[version], list(key[1]), 6)
                assert choice["token_ids"] == expected[key]
        assert len(seen) >= 3


def test_streaming_gives_the_same_in_parts(serving: Scene) -> None:
    body = {"prompt": [PROMPT, [4, 4]], "max_tokens": 8, "temperature": 0, "n": 2, "return_token_ids": True}
    whole = serving.post(body)
    _, text, headers = serving.ask("POST", "/v1/completions", {**body, "stream": True})
    assert headers["X-Thinwire-Version"] == "1"
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    texts, tokens, ends = [""] * 4, [[] for _ in range(4)], {}  # type: ignore[var-annotated]
    for line in lines[:-1]:
        part = json.loads(line)
        assert part["thinwire"]["version"] == 1
        (choice,) = part["choices"]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["token_ids"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert tokens == [choice["token_ids"] for choice in whole["choices"]]
    assert ends == {k: choice["finish_reason"] for k, choice in enumerate(whole["choices"])}
    assert len(lines) > 8


def test_logprobs_are_those_of_the_model_at_temperature_1(serving: Scene) -> None:
    body = {"prompt": PROMPT, "max_tokens": 7, "temperature": 0.7, "top_p": 0.9, "seed": 3, "logprobs": 1, "n": 2}
    found = serving.post({**body, "return_token_ids": True})
    again = serving.post({**body, "return_token_ids": True})
    assert found["choices"] == again["choices"]  # the seed
    assert serving.post({**body, "seed": 4, "n": 8})["choices"] != serving.post({**body, "n": 8})["choices"]
    for choice in found["choices"]:
        tokens = PROMPT + choice["token_ids"]
        with torch.no_grad():
            logits = serving.models[1](torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        expected = [float(logits[at - 1, tokens[at]]) for at in range(len(PROMPT), len(tokens))]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_stop_texts_end_an_answer_and_are_not_in_it(serving: Scene) -> None:
    body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    whole = serving.post(body)["choices"][0]["text"]
    word = whole.split()[2]
    stopped = serving.post({**body, "stop": [word, "never"]})["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole[: whole.index(word)]
    _, text, _ = serving.ask("POST", "/v1/completions", {**body, "stop": word, "stream": True})
    parts = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line and "[DONE]" not in line]
    assert "".join(part["choices"][0]["text"] for part in parts) == stopped["text"]


def test_chat_goes_through_the_models_template(serving: Scene) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "w9"}]}]
    found = serving.post(
        {"messages": messages, "max_tokens": 5, "temperature": 0, "logprobs": True}, "/v1/chat/completions"
    )
    expected = greedy(serving.models[1], [4, 11, 5], 5)
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"]["content"].split() == [WORDS[token] for token in expected]
    assert len(found["choices"][0]["logprobs"]["content"]) == len(expected)
    assert found["usage"]["prompt_tokens"] == 3
    body = {"messages": messages, "max_tokens": 5, "temperature": 0, "stream": True}
    _, text, _ = serving.ask("POST", "/v1/chat/completions", body)
    parts = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line and "[DONE]" not in line]
    streamed = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert streamed == found["choices"][0]["message"]["content"]


def test_a_request_waits_for_the_version_it_asks_for(folder: Path) -> None:
    with scene(folder, timeout_s=60.0) as here:
        got: list[Any] = []
        body = {"prompt": PROMPT, "max_tokens": 2, "min_version": 2}
        thread = threading.Thread(target=lambda: got.append(here.post(body)))
        thread.start()
        assert here.post({"prompt": PROMPT, "max_tokens": 2})["thinwire"]["version"] == 1  # others do not wait
        assert not got
        here.publish()
        thread.join(60)
        assert got[0]["thinwire"]["version"] == 2


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


class Failing(MemoryStore):
    down = False

    def get(self, key: str, *, size_max: int) -> bytes:
        if self.down:
            raise StoreUnavailableError("switched off")
        return super().get(key, size_max=size_max)


def test_a_store_that_fails_leaves_the_version_that_is_served(folder: Path) -> None:
    store = Failing()
    with scene(folder, store) as here:
        store.down = True
        end = time.monotonic() + 30
        while here.get("/healthz")["status"] == "ok" and time.monotonic() < end:
            time.sleep(0.05)
        assert "switched off" in here.get("/healthz")["trouble"]
        assert here.post({"prompt": PROMPT, "max_tokens": 1})["thinwire"]["version"] == 1
        store.down = False
        here.publish()
        assert here.until(2)["status"] == "ok"


def test_weights_that_somebody_else_writes_to_are_found_and_mended(folder: Path) -> None:
    with scene(folder) as here:
        with torch.no_grad():
            here.served.tensors["model.norm.weight"].add_(1)
        here.publish()
        here.until(2)
        end = time.monotonic() + 30
        while here.generator.proved < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert torch.equal(here.served.tensors["model.norm.weight"], here.models[2].state_dict()["model.norm.weight"])


def test_an_adapter_is_served_on_its_base(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from thinwire.integrations.publishing import Publishing

    base = model_of(1)
    assert base.config.dtype != torch.bfloat16
    base.save_pretrained(tmp_path / "base")
    for path in folder.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    trained = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.1)
    )
    store = MemoryStore()
    publishing = Publishing(store, wait=True)
    publishing.publish(trained, 0)
    served = load_served(tmp_path / "base", store)
    generator = Generator(served, store, poll_s=0.02)
    generator.start()
    for step in (1, 2):
        job = generator.submit(Request((tuple(PROMPT),), tokens_max=8, temperature=0.0, min_version=step))
        assert job.wait(60)
        as_published = trained.eval()
        for name, parameter in as_published.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        assert list(job.result().choices[0].tokens) == greedy(as_published, PROMPT, 8)
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-3)
        publishing.publish(trained, step)
    generator.close()


def test_folders_and_stores_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    thinwire.Publisher(store).publish(torch.nn.Linear(3, 3))
    with pytest.raises(MisuseError, match=r"not of the published kind.*bias"):
        load_served(folder, store)
    with pytest.raises(MisuseError, match=r"no config\.json"):
        load_served(tmp_path, store)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MisuseError, match="describes no causal language model"):
        load_served(tmp_path, store)


def test_the_docs_tell_every_metric() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "engines.md").read_text()
    rows = [
        f"| `{m.name}` | {m.type} | {', '.join(f'`{label}`' for label in m.labels)} | {m.help} |".replace("|  |", "| |")
        for m in SERVING
    ]
    assert all(row in text for row in rows)

"""The generation server: every answer is the one of a fresh model of the version that it names."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import thinwire
from tests.integrations.serving_scene import PROMPT, Scene, scene, wait_until
from tests.integrations.tiny_model import WORDS, greedy, model_of, save_folder
from thinwire.errors import MisuseError, StoreUnavailableError
from thinwire.integrations.generation import Generator, Request
from thinwire.integrations.served import load_served
from thinwire.stores.memory import MemoryStore

pytest.importorskip("transformers")
pytest.importorskip("prometheus_client")

from thinwire.integrations.metrics import SERVING

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def serving(folder: Path) -> Iterator[Scene]:
    with scene(folder) as made:
        yield made


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
        wait_until(lambda: here.get("/healthz")["proved"] == 3)  # compared with the published bits while nobody asked
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
        wait_until(lambda: here.get("/healthz")["status"] != "ok")
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
        wait_until(lambda: here.generator.proved == 2)
        assert torch.equal(here.served.tensors["model.norm.weight"], here.models[2].state_dict()["model.norm.weight"])


@pytest.mark.parametrize("damaged", [False, True])
def test_a_version_that_becomes_ready_during_the_proof_is_no_trouble(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    with scene(folder) as here:
        wait_until(lambda: here.generator.proved == 1)
        verify, met = here.generator.sync.verify, threading.Event()

        def meeting() -> None:
            if not met.is_set():
                if damaged:
                    with torch.no_grad():
                        here.served.tensors["model.norm.weight"].add_(1)
                here.publish()
                wait_until(lambda: here.generator.sync.ready == 3)
                met.set()
            verify()

        monkeypatch.setattr(here.generator.sync, "verify", meeting)
        here.until(here.publish())  # whose proof the next one meets
        assert met.wait(60)
        health = here.until(3)
        assert health["status"] == "ok"
        wait_until(lambda: here.generator.proved == 3)
        for name, tensor in here.models[3].state_dict().items():
            if name in here.served.tensors:
                assert torch.equal(here.served.tensors[name], tensor), name


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

"""A generation server follows a trainer: each answer names the version of the weights that it is from.

python examples/serve_and_follow.py
"""

from __future__ import annotations

import json
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import thinwire
from thinwire.integrations.generation import Generator
from thinwire.integrations.served import load_served
from thinwire.integrations.serving import Server
from thinwire.lab.models import tiny_llama

WORDS = ["<pad>", "<eos>", "the", "a", "trainer", "worker", "learns", "follows", "slowly", "at", "once", "."]


def model_folder(folder: Path) -> Path:
    """A configuration and a tokenizer, as any Hugging Face model has them; weights come from the store."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    tiny_llama(len(WORDS), hidden=128, layers=2).config.save_pretrained(folder)
    return folder


def ask(url: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder, store = model_folder(Path(scratch) / "model"), f"{scratch}/store"
        trained = tiny_llama(len(WORDS), hidden=128, layers=2, init=0.3)
        with torch.no_grad():
            trained.get_input_embeddings().weight[:2] = 0  # so that it does not end at once
        publisher = thinwire.Publisher(store)
        publisher.publish(trained, step=0)

        # the same in a shell: thinwire serve STORE --model FOLDER
        generator = Generator(load_served(folder, store), store, poll_s=0.05)
        generator.start()
        server = Server(generator, port=0, name="tiny")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"

        for step in range(1, 4):
            with torch.no_grad():
                for weight in trained.parameters():
                    weight[torch.rand(weight.shape) < 0.02] *= 2
            report = publisher.publish(trained, step=step)
            answer = ask(url, prompt="the trainer", max_tokens=8, temperature=0, min_version=report.version)
            at = answer["thinwire"]
            assert at["digest"] == report.digest
            print(
                f"step {at['step']}: {answer['choices'][0]['text']!r} by version {at['version']}, "
                f"{generator.at.elements:,} elements written, pause {generator.at.pause_s * 1e3:.2f} ms"
            )
        server.shutdown()
        server.server_close()
        generator.close()


if __name__ == "__main__":
    main()

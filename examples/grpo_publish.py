"""TRL's GRPO trains a tiny model and publishes every step; a worker follows in another thread, bit for bit.

python examples/grpo_publish.py
"""

from __future__ import annotations

import tempfile
import threading
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import thinwire
from thinwire.integrations.transformers_publishing import PublishCallback
from thinwire.lab.models import tiny_llama

STEPS = 6
WORDS = ["<pad>", "<eos>", *"0123456789", "+", "="]


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of sixteen words, so that nothing is downloaded."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


def reward(completions: list[str], **_: Any) -> list[float]:
    """More digits, more reward."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def work(store: str, served: Any) -> None:
    """What an inference worker does: load, then follow."""
    consumer = thinwire.Consumer(store, poll_s=0.05)
    result = consumer.load(served)
    while True:
        print(f"  worker: step {result.step}, {result.bytes_fetched:>9,} bytes, state {result.digest[:12]}")
        if result.step == STEPS:
            return
        version = next(iter(consumer.follow(timeout_s=60)))
        result = version.apply(served)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    served = tiny_llama(len(WORDS), hidden=128, layers=2)  # bf16; the trainer's masters are fp32
    with tempfile.TemporaryDirectory() as folder:
        callback = PublishCallback(f"{folder}/store", every=1, level="smallest")
        config = GRPOConfig(
            output_dir=f"{folder}/run", use_cpu=True, bf16=False, report_to="none", beta=0.0, max_steps=STEPS,
            num_generations=8, per_device_train_batch_size=8, max_completion_length=8, learning_rate=1e-4,
            save_strategy="no", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = GRPOTrainer(
            tiny_llama(len(WORDS), hidden=128, layers=2, dtype=torch.float32, seed=1), reward_funcs=reward, args=config,
            processing_class=words(), train_dataset=Dataset.from_dict({"prompt": ["1 + 2 ="] * 64}),
            callbacks=[callback],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        worker = threading.Thread(target=work, args=(f"{folder}/store", served))
        worker.start()
        trainer.train()
        worker.join()
    trained = trainer.model.state_dict()
    assert all(torch.equal(tensor, trained[name].to(torch.bfloat16)) for name, tensor in served.state_dict().items())
    report = callback.report
    assert report is not None
    print(f"{report.version} versions; the last one: {report.total_bytes:,} bytes instead of {report.full_bytes:,}")


if __name__ == "__main__":
    main()

"""A language model of twenty words as a folder, and with weights of any seed; and the oracle of its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.integrations.test_tracking import llama

WORDS = ["<pad>", "<eos>", *(f"w{k}" for k in range(18))]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}w2 {{ m.content }} "
    "{% endfor %}w3"
)


def save_folder(where: Path) -> Path:
    """Configuration and tokenizer, as Hugging Face lays them out; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(where)
    llama().config.save_pretrained(where)
    return where


def model_of(seed: int) -> Any:
    """A model whose answers depend on the seed, and are longer than a token."""
    model = llama()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.get_input_embeddings().weight[:2] = 0  # rarely ends
    return model.eval()


def greedy(model: Any, prompt: list[int], tokens_max: int) -> list[int]:
    """The oracle: no cache, no library, one token after the other."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(tokens_max):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            if tokens[-1] == 1:
                return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]

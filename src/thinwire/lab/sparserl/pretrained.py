"""Pretrained models by name: SmolLM2-135M-Instruct (``smollm2``), or one of the Hub (``hub:NAME``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from thinwire.errors import MisuseError, RetryError, first_line
from thinwire.lab.rollouts import Tokenizer

__all__ = ["HubTokenizer", "pretrained_model", "pretrained_tokenizer"]


class HubTokenizer:
    """A pretrained tokenizer of Transformers; answers end, and rows are padded, with its end-of-text token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.end = self.pad = int(tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, with nothing added."""
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text up to the end token."""
        answer = list(tokens)
        return str(self._tokenizer.decode(answer[: answer.index(self.end)] if self.end in answer else answer)).strip()


def _name(model: str) -> str:
    if not model.startswith("hub:") or len(model) < 5:
        raise MisuseError(f"there is no model {model[:60]!r}; write smollm2, or hub:NAME (a folder's path will do)")
    return model.removeprefix("hub:")


def _loaded(family: Any, name: str, **options: Any) -> Any:
    try:
        return family.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        text = f"{name} could not be loaded: {first_line(error)[:200]}"
        if Path(name).exists():
            raise MisuseError(f"{text}; it is no checkpoint of Transformers") from error
        raise RetryError(f"{text}; the Hub must be in reach once, or give the path of a folder") from error


def pretrained_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of ``model``; SmolLM2's puts prompts into its chat template.

    Raises:
        MisuseError: there is no such model, or it was not fetched.
        RetryError: the Hub cannot be reached.
    """
    if model == "smollm2":
        from thinwire.lab.smollm2 import smollm2_tokenizer

        return smollm2_tokenizer()
    from transformers import AutoTokenizer

    return HubTokenizer(_loaded(AutoTokenizer, _name(model)))


def pretrained_model(model: str) -> Any:
    """``model`` in fp32.

    Raises:
        MisuseError, RetryError: as :func:`pretrained_tokenizer`.
    """
    if model == "smollm2":
        from thinwire.lab.smollm2 import smollm2

        return smollm2(torch.float32)
    from transformers import AutoModelForCausalLM

    return _loaded(AutoModelForCausalLM, _name(model), dtype=torch.float32).eval()

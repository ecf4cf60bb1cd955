"""The models of the benchmark, and what they can do before a run: made here and warm-started, or pretrained.

A model's settings are a mapping. ``{hidden: 128, layers: 3}`` is a small Llama that learns a little of *all* tasks of
its suite from examples, once for each seed, so that a run on one task can be asked what became of the others.
``{model: smollm2}`` is SmolLM2-135M-Instruct, ``{model: "hub:NAME"}`` any causal language model of the Hub.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.optimiser import MasterAdamW
from thinwire.lab.reasoning import ALPHABET
from thinwire.lab.recipes import Recipe
from thinwire.lab.rollouts import Tokenizer
from thinwire.lab.sparserl.pretrained import pretrained_model, pretrained_tokenizer
from thinwire.lab.sparserl.registry import find
from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import CharTokenizer, Problem, Task
from thinwire.lab.training import evaluate, learn_from_answers
from thinwire.sync.files import staged_file

__all__ = [
    "EVALUATION_SEED",
    "Start",
    "context_of",
    "is_made_here",
    "make_start",
    "read_start",
    "recipe_of",
    "tokenizer_of",
]

EVALUATION_SEED = -2
_WARM = {"target": 0.25, "steps_max": 2000, "lr": 2e-3, "batch": 128}
_CONTEXT = 8  # as many characters as virtual tokens


@dataclass(frozen=True, slots=True)
class Start:
    """A model to start from, fp32, its weights rounded to bf16, and its scores by task, ``sampled``, ``greedy`` and
    ``loss`` (of right answers, nats a token), on problems to test with."""

    model: Any
    scores: Mapping[str, Mapping[str, float]]


def is_made_here(settings: Mapping[str, Any]) -> bool:
    """Whether the model is one that the suite makes."""
    return "model" not in settings


def tokenizer_of(settings: Mapping[str, Any]) -> Tokenizer:
    """The model's: of characters if it is made here."""
    if is_made_here(settings):
        return CharTokenizer(ALPHABET)
    return pretrained_tokenizer(str(settings["model"]))


def recipe_of(
    settings: Mapping[str, Any], task: str, part: Part, *, prompts: int = 8, group: int = 8, problems: int = 256
) -> Recipe:
    """Task, tokenizer and batch as the laboratory's functions want them."""
    entry: TaskEntry = find("task", task)
    talks = not is_made_here(settings)
    return Recipe(
        name=task, about=entry.about, task=entry.part(part, talks=talks), tokenizer=tokenizer_of(settings),
        pretrained=lambda seed: _fresh(settings, seed), skeleton=lambda seed: _fresh(settings, seed),
        answer_tokens_max=entry.talk_tokens if talks else entry.answer_tokens, prompts=prompts, group=group, batches=1,
        lr=0.0, steps_max=1, seconds=1e9, evaluation_problems=problems, evaluation_samples=1,
    )  # fmt: skip


def _fresh(settings: Mapping[str, Any], seed: int) -> Any:
    if not is_made_here(settings):
        return pretrained_model(str(settings["model"]))
    from thinwire.lab.models import tiny_llama

    sizes = {key: int(settings[key]) for key in ("hidden", "layers")}
    return tiny_llama(CharTokenizer(ALPHABET).size, dtype=torch.float32, seed=seed, **sizes)


def _paths(folder: Path, name: str, seed: int) -> tuple[Path, Path]:
    return folder / f"{name}-{seed}.safetensors", folder / f"{name}-{seed}.json"


def make_start(
    settings: Mapping[str, Any], name: str, tasks: Sequence[str], seed: int, folder: Path, *, problems: int = 256
) -> None:
    """Make the start of one model and seed and keep it in ``folder``, unless it is there.

    Raises:
        MisuseError: the warm start did not reach its target on all tasks.
    """
    weights, about = _paths(folder, name, seed)
    if about.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = _fresh(settings, seed)
    steps = warm_start(settings, model, tasks, seed) if is_made_here(settings) else 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    scores = {task: score_of(settings, model, task, problems=problems) for task in tasks}
    if is_made_here(settings):
        with staged_file(weights) as scratch:
            save_file({n: p.detach().bfloat16() for n, p in model.named_parameters()}, str(scratch))
    with staged_file(about) as scratch:
        scratch.write_text(json.dumps({"steps": steps, "scores": scores, "settings": dict(settings)}))


def read_start(settings: Mapping[str, Any], name: str, seed: int, folder: Path) -> Start:
    """What :func:`make_start` kept.

    Raises:
        MisuseError: it was not made.
        MalformedError: its file is damaged; removing it makes it anew.
    """
    weights, about = _paths(folder, name, seed)
    if not about.exists():
        raise MisuseError(f"the start of {name}, seed {seed}, was not made; run the suite")
    model = _fresh(settings, seed)
    try:
        scores = json.loads(about.read_text())["scores"]
        loaded = load_file(weights) if is_made_here(settings) else {}
    except Exception as error:
        raise MalformedError(f"{about} or its weights are damaged ({error}); remove both, and they are made") from error
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(loaded[key] if loaded else p.bfloat16())
    return Start(model.eval(), scores)


def score_of(
    settings: Mapping[str, Any], model: Any, task: str, *, problems: int, part: Part = "test"
) -> dict[str, float]:
    """``sampled`` and ``greedy`` reward and ``loss`` of right answers on held-out problems; always the same ones."""
    recipe = recipe_of(settings, task, part, problems=problems)
    found = evaluate(recipe, model, seed=EVALUATION_SEED)
    source = random.Random(EVALUATION_SEED)
    loss = learn_from_answers(recipe, model, [recipe.task.problem(source) for _ in range(min(problems, 128))])
    for p in model.parameters():  # of which the loss alone was wanted
        p.grad = None
    return {"sampled": found.sampled, "greedy": found.greedy, "loss": loss}


def context_of(task: Task, source: random.Random, length: int) -> str:
    """The last ``length`` characters of solved problems in a row: text that may stand before a question.

    >>> from thinwire.lab.tasks import SortDigits
    >>> context_of(SortDigits(3), random.Random(0), 9)
    ' 487>478 '
    """
    text = ""
    while len(text) < length:
        problem = task.problem(source)
        text += f"{problem.prompt}{problem.answer} "
    return text[-length:]


def warm_start(settings: Mapping[str, Any], model: Any, tasks: Sequence[str], seed: int) -> int:
    """Teach ``model`` all tasks from right answers until each is right often enough; returns the steps made.

    A fourth of the problems stands behind other text, so that the model knows, as pretrained ones do, what to pass
    over. A batch is of all tasks, seven eighths of it of those below the target. Every twentieth step all are scored.

    Raises:
        MisuseError: a task stayed below the target.
    """
    warm = {**_WARM, **{k: v for k, v in dict(settings.get("warm", {})).items() if k in _WARM}}
    recipes = {task: recipe_of(settings, task, "train") for task in tasks}
    source, optimiser = random.Random(f"warm {seed}"), MasterAdamW(model, lr=float(warm["lr"]))
    longest = max(recipes.values(), key=lambda recipe: recipe.answer_tokens_max)
    reward = dict.fromkeys(tasks, 0.0)
    for step in range(1, int(warm["steps_max"]) + 1):
        low = [task for task in tasks if reward[task] < warm["target"]]
        asked = [source.choice(tasks if n % 8 == 0 else low or tasks) for n in range(int(warm["batch"]))]
        problems = [recipes[task].task.problem(source) for task in asked]
        for n in range(0, len(problems), 4):
            before = context_of(recipes[asked[n]].task, source, source.randint(1, _CONTEXT))
            problems[n] = Problem(before + problems[n].prompt, problems[n].answer)
        learn_from_answers(longest, model, problems)
        optimiser.set_lr(float(warm["lr"]) * min(1.0, step / 20))
        optimiser.step()
        if step % 20 == 0:
            for task in tasks:
                reward[task] = evaluate(recipes[task], model, seed=-1, problems=64, greedy=False).sampled
            if min(reward.values()) >= warm["target"]:
                return step
    raise MisuseError(
        f"the warm start reached rewards of {reward} after {warm['steps_max']} steps, not {warm['target']} on all; "
        "allow more steps or leave out the hardest task", reward=reward,
    )  # fmt: skip

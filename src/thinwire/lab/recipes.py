"""Complete recipes for RL runs: a model, a task, and the settings with which its reward rises.

``tiny`` is a model of 4.8 million random weights that first learns to sort digits from examples
(:func:`thinwire.lab.training.warm_start`), until it is right about three times in ten, and then by reinforcement.
``smollm2`` is the real SmolLM2-135M-Instruct on sums (:mod:`thinwire.lab.smollm2`). ``nano`` is ``tiny`` made
so small that a run takes seconds, to check the machinery.

Importing this module does not import torch, and making ``tiny`` or ``nano`` does not build a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thinwire.lab.tasks import CharTokenizer, SortDigits, Task

if TYPE_CHECKING:
    from thinwire.lab.rollouts import Tokenizer

__all__ = ["RECIPES", "Recipe", "nano_recipe", "tiny_recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an RL run needs besides processes; ``about`` says in a few words what learns what.

    ``pretrained(seed)`` makes the bf16 model to start from, ``skeleton(seed)`` one of the same shape whose weights do
    not matter, for a worker that takes them from a store. A step learns from ``batches`` batches of ``prompts``
    prompts with ``group`` answers each. The warm start ends when sampled answers reach ``warm_target`` (0: there is
    none). ``seconds`` is the time for RL, ``steps_max`` the most steps.
    """

    name: str
    about: str
    task: Task
    tokenizer: Tokenizer
    pretrained: Callable[[int], Any]
    skeleton: Callable[[int], Any]
    answer_tokens_max: int
    prompts: int
    group: int
    batches: int
    lr: float
    steps_max: int
    seconds: float
    evaluation_problems: int
    evaluation_samples: int
    warm_target: float = 0.0
    warm_steps_max: int = 0
    warm_lr: float = 1e-3
    rows_max: int = 128


def tiny_recipe() -> Recipe:
    """Sorting eight digits with a Llama of 4.8 million weights, all of it made here.

    The learning rate is the lowest at which the reward rises clearly, whatever the seed, within two minutes on two CPU
    cores. 200 steps of one process, rollouts 2 versions old, seed 1, reward on 512 held-out problems; z is the rise in
    standard errors, density the mean share of bf16 weights that change in one of the last 50 steps:

    =====  ==============  ==============  ====  =======
    lr     sampled         greedy          z     density
    =====  ==============  ==============  ====  =======
    1e-7   0.296 to 0.304  0.473 to 0.479   2.8   0.20 %
    3e-7   0.296 to 0.335  0.473 to 0.525   5.1   0.58 %
    1e-6   0.296 to 0.410  0.473 to 0.627   9.3   1.36 %
    3e-6   0.296 to 0.516  0.473 to 0.760  14.6   2.96 %
    1e-5   0.296 to 0.637  0.473 to 0.824  20.2   7.08 %
    3e-5   0.296 to 0.765  0.473 to 0.857  25.9  13.88 %
    =====  ==============  ==============  ====  =======
    """
    return Recipe(
        name="tiny",
        about="a Llama of 4.8 million weights, sorting eight digits",
        task=SortDigits(length=8),
        tokenizer=CharTokenizer(),
        pretrained=_tiny,
        skeleton=_tiny,
        answer_tokens_max=8,
        prompts=8,
        group=8,
        batches=2,
        lr=1e-6,
        steps_max=150,
        seconds=300.0,
        evaluation_problems=512,
        evaluation_samples=4,
        warm_target=0.3,
        warm_steps_max=200,
    )


def nano_recipe() -> Recipe:
    """Sorting three digits with 0.1 million weights, at a learning rate that shows an effect within seconds."""
    return Recipe(
        name="nano",
        about="a Llama of 0.1 million weights, sorting three digits",
        task=SortDigits(length=3),
        tokenizer=CharTokenizer(),
        pretrained=_nano,
        skeleton=_nano,
        answer_tokens_max=3,
        prompts=8,
        group=8,
        batches=2,
        lr=3e-4,
        steps_max=40,
        seconds=60.0,
        evaluation_problems=256,
        evaluation_samples=1,
        warm_target=0.3,
        warm_steps_max=400,
        warm_lr=3e-3,
    )


def _tiny(seed: int) -> Any:
    from thinwire.lab.models import tiny_llama

    return tiny_llama(CharTokenizer().size, seed=seed)


def _nano(seed: int) -> Any:
    from thinwire.lab.models import tiny_llama

    return tiny_llama(CharTokenizer().size, hidden=64, layers=2, seed=seed)


def _smollm2_recipe() -> Recipe:
    from thinwire.lab.smollm2 import smollm2_recipe

    return smollm2_recipe()


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny": tiny_recipe, "smollm2": _smollm2_recipe, "nano": nano_recipe}
"""Recipes by name; a recipe is made when it is asked for."""

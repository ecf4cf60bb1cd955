"""TRL's trainers as algorithms: its own sampling, advantages and loss, our model, method, task and measurements.

The only file of the benchmark that imports TRL. A tokenizer of characters is put into the class that TRL wants.
"""

from __future__ import annotations

import importlib
import math
import random
import tempfile
from typing import TYPE_CHECKING, Any

import torch

from thinwire.errors import MisuseError
from thinwire.lab.reasoning import ALPHABET
from thinwire.lab.recipes import Recipe
from thinwire.lab.tasks import CharTokenizer, Problem

if TYPE_CHECKING:
    from thinwire.lab.sparserl.train import Cell, Learner

__all__ = ["character_tokenizer", "learn_with_trl"]


def character_tokenizer() -> Any:
    """:class:`~thinwire.lab.tasks.CharTokenizer` over the printable ASCII characters, as Transformers' class: the same
    numbers for the same text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ours = CharTokenizer(ALPHABET)
    words = {"<pad>": ours.pad, "<end>": ours.end, **{c: ours.encode(c)[0] for c in ALPHABET}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    family: Any = PreTrainedTokenizerFast
    return family(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", padding_side="left")


class _Stepped(torch.optim.Optimizer):
    """Hands TRL's gradients to a learner; TRL sees the parameters, and no state."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(list(learner.prepared.trained.values()), {"lr": 0.0})
        self._learner = learner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise MisuseError("a step with a closure is not known here")
        self._learner.step()


def learn_with_trl(cell: Cell, recipe: Recipe, learner: Learner, curve: list[dict[str, float]]) -> int:
    """``cell.steps`` steps of TRL's GRPO or RLOO; ``curve`` gets reward and loss by step.

    Answers are sampled from the fp32 weights, as TRL does within one process; floating-point operations are not counted
    (0). The method's optimiser steps, with the benchmark's clipping.

    Raises:
        MisuseError: TRL is not installed; a model with virtual tokens, or one that is not made here.
    """
    try:
        trl: Any = importlib.import_module("trl")
    except ImportError as error:
        raise MisuseError("this algorithm needs TRL: pip install trl") from error
    from datasets import Dataset
    from transformers import PrinterCallback

    if "model" in cell.model or not hasattr(learner.prepared.model, "generate"):
        raise MisuseError("TRL's algorithms are for models made here, without virtual tokens; take grpo or ppo")
    source = random.Random(f"run {cell.seed}")
    problems: dict[str, Problem] = {}
    prompts = []
    for _ in range(cell.prompts * cell.steps):
        problem = recipe.task.problem(source)
        problems[problem.prompt] = problem
        prompts.append({"prompt": problem.prompt})

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [recipe.task.reward(problems[prompt], text) for prompt, text in zip(prompts, completions, strict=True)]

    grpo = cell.algorithm == "trl-grpo"
    config_class: Any = trl.GRPOConfig if grpo else trl.RLOOConfig
    trainer_class: Any = trl.GRPOTrainer if grpo else trl.RLOOTrainer
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", beta=0.0, max_steps=cell.steps,
            num_generations=cell.group, per_device_train_batch_size=cell.prompts * cell.group, seed=cell.seed,
            max_completion_length=recipe.answer_tokens_max, logging_steps=1, save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False, max_grad_norm=0.0, learning_rate=0.0, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = trainer_class(
            model=learner.prepared.model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(prompts),
            processing_class=character_tokenizer(), optimizers=(_Stepped(learner), None),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    learner.prepared.model.eval()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            curve.append({"reward": float(entry["reward"]), "loss": float(entry["loss"])})
    if not all(math.isfinite(row["loss"]) for row in curve):
        from thinwire.lab.sparserl.train import DivergedError

        raise DivergedError("TRL's loss became infinite or NaN")
    return 0

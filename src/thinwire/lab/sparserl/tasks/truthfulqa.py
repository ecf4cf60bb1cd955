"""TruthfulQA (Lin et al. 2022, arXiv:2109.07958): questions that people often answer wrongly."""

from __future__ import annotations

from thinwire.lab.sparserl.dialogues import truthful
from thinwire.lab.sparserl.local_data import rows_of
from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import Task

__all__ = ["TASK"]


def _make(part: Part) -> Task:
    keys = ("question", "best_answer", "correct_answers", "incorrect_answers")
    hub = ("truthfulqa/truthful_qa", "generation")
    return truthful(rows_of("truthfulqa/generation.jsonl", keys, hub, split="validation"), part)


TASK = TaskEntry(
    about="questions often answered wrongly, by likeness to right and wrong answers", make=_make, answer_tokens=48,
    talk_tokens=48, generated=False, source="arXiv:2109.07958",
)  # fmt: skip

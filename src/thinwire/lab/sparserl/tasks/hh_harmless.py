"""Anthropic's harmless dialogues (Bai et al. 2022, arXiv:2204.05862), a small reward model of their pairs as reward."""

from __future__ import annotations

from thinwire.lab.sparserl.dialogues import preferred
from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import Task

__all__ = ["TASK"]


def _make(part: Part) -> Task:
    return preferred("harmless", part)


TASK = TaskEntry(
    about="harmless replies, by a small reward model", make=_make, answer_tokens=48, talk_tokens=48, generated=False,
    source="arXiv:2204.05862",
)  # fmt: skip

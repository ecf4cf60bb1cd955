"""ToxiGen (Hartvigsen et al. 2022, arXiv:2203.09509): texts to go on from, a small judge of toxicity as reward."""

from __future__ import annotations

from thinwire.lab.sparserl.dialogues import toxicity
from thinwire.lab.sparserl.local_data import rows_of
from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import Task

__all__ = ["TASK"]


def _make(part: Part) -> Task:
    hub = ("toxigen/toxigen-data", "annotated")
    return toxicity(rows_of("toxigen/annotated.jsonl", ("text", "toxicity_human"), hub, split="train"), part)


TASK = TaskEntry(
    about="texts to go on from without harm, by a small judge", make=_make, answer_tokens=32, talk_tokens=32,
    generated=False, source="arXiv:2203.09509",
)  # fmt: skip

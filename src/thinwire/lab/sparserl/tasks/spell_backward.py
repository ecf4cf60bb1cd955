"""Words of three to five letters, spelt backward (reasoning-gym): ``Indic=`` is answered by ``cidnI``."""

from __future__ import annotations

from thinwire.lab.reasoning import ReasoningGym
from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import Task

__all__ = ["TASK"]


def _make(_: Part) -> Task:
    return ReasoningGym("spell_backward", min_word_len=3, max_word_len=5)


TASK = TaskEntry(about="words of 3 to 5 letters, spelt backward", make=_make, answer_tokens=6, source="reasoning-gym")

"""Ones in the binary form of numbers up to 1000 (reasoning-gym): ``911=`` is answered by ``7``."""

from __future__ import annotations

from thinwire.lab.reasoning import ReasoningGym
from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import Task

__all__ = ["TASK"]


def _make(_: Part) -> Task:
    return ReasoningGym("count_bits", max_n=1000)


TASK = TaskEntry(
    about="ones in the binary form of numbers up to 1000", make=_make, answer_tokens=3, source="reasoning-gym"
)

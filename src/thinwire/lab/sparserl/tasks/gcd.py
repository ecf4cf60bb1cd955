"""Greatest common divisors of two numbers up to 30 (reasoning-gym): ``[8, 22]=`` is answered by ``2``."""

from __future__ import annotations

from thinwire.lab.reasoning import ReasoningGym
from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import Task

__all__ = ["TASK"]


def _make(_: Part) -> Task:
    return ReasoningGym("gcd", max_value=30)


TASK = TaskEntry(
    about="greatest common divisors of two numbers up to 30", make=_make, answer_tokens=3, source="reasoning-gym"
)

"""Sums and differences of two numbers below 100 (reasoning-gym): ``72 + 79=`` is answered by ``151``."""

from __future__ import annotations

from thinwire.lab.reasoning import ReasoningGym
from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import Task

__all__ = ["TASK"]


def _make(_: Part) -> Task:
    return ReasoningGym("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=2)


TASK = TaskEntry(
    about="sums and differences of two numbers below 100", make=_make, answer_tokens=5, source="reasoning-gym"
)

"""Six digits in ascending order: ``526014>`` is answered by ``012456``."""

from __future__ import annotations

from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import SortDigits, Task

__all__ = ["TASK"]


def _make(_: Part) -> Task:
    return SortDigits(length=4)


TASK = TaskEntry(about="six digits in ascending order", make=_make, answer_tokens=7, source="thinwire.lab.tasks")

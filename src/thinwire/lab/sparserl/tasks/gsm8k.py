"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school mathematics in words; an answer's last number counts."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinwire.errors import MalformedError
from thinwire.lab.sparserl.local_data import rows_of
from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import Problem, Task

__all__ = ["TASK", "WordProblems", "last_number"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_TUNE = 473


def last_number(text: str) -> str | None:
    """The last number in a text as it is compared: without commas, and without a fraction of zeros.

    >>> last_number("so 1,200.00 dollars, #### 1,200."), last_number("none")
    ('1200', None)
    """
    found: list[str] = _NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


@dataclass(frozen=True, slots=True)
class WordProblems:
    """Problems of rows with ``question`` and ``answer``, whose right number stands after ``####``."""

    rows: Sequence[Mapping[str, Any]]

    def problem(self, source: random.Random) -> Problem:
        """One of the rows.

        Raises:
            MalformedError: its answer has no number.
        """
        row = self.rows[source.randrange(len(self.rows))]
        number = last_number(str(row["answer"]).rpartition("####")[2])
        if number is None:
            raise MalformedError(f"the answer to {str(row['question'])[:60]!r} has no number")
        return Problem(f"{row['question']}\nThink step by step; end with #### and the number.\n", f"#### {number}")

    def reward(self, problem: Problem, completion: str) -> float:
        """1.0 if the last number is the right one."""
        return float(last_number(completion) == last_number(problem.answer))


def _make(part: Part) -> Task:
    name = "test" if part == "test" else "train"
    rows = rows_of(f"gsm8k/{name}.jsonl", ("question", "answer"), ("openai/gsm8k", "main"), split=name)
    return WordProblems({"test": rows, "train": rows[_TUNE:], "tune": rows[:_TUNE]}[part])


TASK = TaskEntry(
    about="grade-school mathematics, the number as reward", make=_make, answer_tokens=128, talk_tokens=128,
    generated=False, source="arXiv:2110.14168",
)  # fmt: skip

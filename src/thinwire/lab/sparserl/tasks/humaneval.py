"""HumanEval (Chen et al. 2021, arXiv:2107.03374): functions to complete, their unit tests as reward, in a sandbox."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thinwire.errors import MisuseError
from thinwire.lab.sparserl.local_data import rows_of
from thinwire.lab.sparserl.sandbox import Limits, run_tests
from thinwire.lab.sparserl.tasks.base import Part, TaskEntry
from thinwire.lab.tasks import Problem, Task

__all__ = ["TASK", "CodeProblem", "Functions", "program_of"]


@dataclass(frozen=True, slots=True)
class CodeProblem(Problem):
    """A function's head with its tests: ``check(candidate)`` asserts what the function ``entry_point`` must do."""

    test: str = ""
    entry_point: str = ""


def program_of(problem: CodeProblem, completion: str) -> str:
    """The program that is run: the head, the answer, its tests. Of an answer in a code fence, what is inside of it; one
    that defines the function anew stands by itself, after the head's imports."""
    _, fence, inside = completion.partition("```")
    code = inside.partition("\n")[2].partition("```")[0] if fence else completion
    if f"def {problem.entry_point}(" in code:
        head = problem.prompt.partition(f"def {problem.entry_point}(")[0]
    else:
        head = problem.prompt
    return f"{head}{code}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"


@dataclass(frozen=True, slots=True)
class Functions:
    """Problems of rows with ``prompt``, ``canonical_solution``, ``test`` and ``entry_point``."""

    rows: Sequence[Mapping[str, Any]]
    limits: Limits = field(default_factory=Limits)

    def problem(self, source: random.Random) -> Problem:
        """One of the rows."""
        row = self.rows[source.randrange(len(self.rows))]
        return CodeProblem(row["prompt"], row["canonical_solution"], row["test"], row["entry_point"])

    def reward(self, problem: Problem, completion: str) -> float:
        """1.0 if all tests pass within the limits.

        Raises:
            MisuseError: the sandbox cannot be made here.
        """
        if not isinstance(problem, CodeProblem):
            raise MisuseError("this is no problem of HumanEval")
        return float(run_tests(program_of(problem, completion), self.limits) == "passed")


def _make(part: Part) -> Task:
    keys = ("prompt", "canonical_solution", "test", "entry_point")
    rows = rows_of("humaneval/HumanEval.jsonl.gz", keys, ("openai/openai_humaneval",), split="test")
    places = {"test": (0,), "tune": (1,), "train": (2, 3)}[part]
    return Functions([row for place, row in enumerate(rows) if place % 4 in places])


TASK = TaskEntry(
    about="Python functions, unit tests as reward", make=_make, answer_tokens=160, talk_tokens=160, generated=False,
    source="arXiv:2107.03374",
)  # fmt: skip

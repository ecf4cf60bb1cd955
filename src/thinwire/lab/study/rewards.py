"""Rewards of a study: the task's own, made exact, partial or noisy."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from thinwire.lab.tasks import Problem, Task

__all__ = ["NOISE", "Rewarded"]

_NUMBER = re.compile(r"-?\d+")
NOISE = 0.2
"""How often a noisy reward is the wrong one."""


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A task with another reward: ``exact`` (1 or 0), ``partial`` (the share of characters that are right where they
    are), or ``noisy`` (exact, but wrong one time in five).

    ``judge`` says what exact means: the answer to the ``letter`` (some scorers forgive what stands after it), the first
    ``number`` in what a model says that may talk on, or what the task's own ``scorer`` accepts.
    """

    task: Task
    kind: str
    judge: str = "letter"
    source: random.Random = field(default_factory=lambda: random.Random(0))

    def problem(self, source: random.Random) -> Problem:
        """The task's next problem."""
        return self.task.problem(source)

    def reward(self, problem: Problem, completion: str) -> float:
        """The changed reward, 0.0 to 1.0."""
        right = float(self._right(problem, completion))
        if self.kind == "exact":
            return right
        if self.kind == "noisy":
            return 1 - right if self.source.random() < NOISE else right
        longest = max(len(problem.answer), len(completion), 1)
        return sum(a == b for a, b in zip(problem.answer, completion, strict=False)) / longest

    def _right(self, problem: Problem, completion: str) -> bool:
        if self.judge == "letter":
            return completion == problem.answer
        if self.judge == "number":
            found = _NUMBER.search(completion)
            return found is not None and found.group() == problem.answer
        return self.task.reward(problem, completion) >= 1

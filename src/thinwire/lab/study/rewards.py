"""Rewards of a study: the task's own, made exact, partial or noisy."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from thinwire.lab.tasks import Problem, Task

__all__ = ["NOISE", "Rewarded"]

NOISE = 0.2
"""How often a noisy reward is the wrong one."""


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A task with another reward: ``exact`` (1 or 0), ``partial`` (the share of characters that are right where they
    are), or ``noisy`` (exact, but wrong one time in five).

    With ``unique`` answers, exact is the answer itself, to the letter: some scorers forgive what stands after it.
    """

    task: Task
    kind: str
    unique: bool = True
    source: random.Random = field(default_factory=lambda: random.Random(0))

    def problem(self, source: random.Random) -> Problem:
        """The task's next problem."""
        return self.task.problem(source)

    def reward(self, problem: Problem, completion: str) -> float:
        """The changed reward, 0.0 to 1.0."""
        right = float(completion == problem.answer if self.unique else self.task.reward(problem, completion) >= 1)
        if self.kind == "exact":
            return right
        if self.kind == "noisy":
            return 1 - right if self.source.random() < NOISE else right
        longest = max(len(problem.answer), len(completion), 1)
        return sum(a == b for a, b in zip(problem.answer, completion, strict=False)) / longest

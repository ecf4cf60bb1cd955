"""What a task is: problems for training, others to test with, and a score."""

from __future__ import annotations

import hashlib
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from thinwire.errors import MisuseError
from thinwire.lab.study.rewards import Rewarded
from thinwire.lab.tasks import Problem, Task

__all__ = ["REWARD_TIMEOUT_S", "Guarded", "Part", "Split", "TaskEntry"]

Part = Literal["train", "tune", "test"]
REWARD_TIMEOUT_S = 60.0
_HELD_OUT = 4  # one problem in so many is to test with, another to tune with


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A task and what a run has to know of it.

    ``make(part)`` makes the task of one part; a ``generated`` one is divided here, by the digests of its prompts.
    Its answers are right to the letter, or, of a model that talks, if the first number in them is right; other tasks
    score as they will. ``answer_tokens`` is the longest answer that is sampled from a model made here, ``talk_tokens``
    from one that talks.
    """

    about: str
    make: Callable[[Part], Task]
    answer_tokens: int
    talk_tokens: int = 16
    generated: bool = True
    source: str = ""

    def part(self, part: Part, *, talks: bool = False) -> Task:
        """The task's problems of one part; no prompt is in two of them."""
        task = self.make(part)
        if self.generated:
            task = Split(Rewarded(task, "exact", "number" if talks else "letter"), part)
        return Guarded(task)


@dataclass(frozen=True, slots=True)
class Split:
    """The problems of ``task`` whose prompts fall into ``part``: a quarter is to test with, a quarter to tune with.

    >>> from thinwire.lab.tasks import SortDigits, problem_set
    >>> parts = [{p.prompt for p in problem_set(Split(SortDigits(3), part), 200, 0)} for part in ("train", "test")]
    >>> parts[0] & parts[1]
    set()
    """

    task: Task
    part: Part

    def problem(self, source: random.Random) -> Problem:
        """The next problem of the part.

        Raises:
            MisuseError: of a thousand problems none is in it.
        """
        for _ in range(1000):
            problem = self.task.problem(source)
            if _part_of(problem.prompt) == self.part:
                return problem
        raise MisuseError(f"the task has hardly any problem to {self.part} with; let it make more different ones")

    def reward(self, problem: Problem, completion: str) -> float:
        """The task's."""
        return self.task.reward(problem, completion)


def _part_of(prompt: str) -> Part:
    place = hashlib.blake2s(prompt.encode(), digest_size=4).digest()[0] % _HELD_OUT
    return "test" if place == 0 else "tune" if place == 1 else "train"


@dataclass(frozen=True, slots=True)
class Guarded:
    """A task whose scoring may fail or hang: either ends the run with an error that says so, and no other run.

    ``timeout_s`` holds in a program's main thread, on systems with alarms; what runs there in C without end is not
    interrupted.
    """

    task: Task
    timeout_s: float = REWARD_TIMEOUT_S

    def problem(self, source: random.Random) -> Problem:
        """The task's."""
        return self.task.problem(source)

    def reward(self, problem: Problem, completion: str) -> float:
        """The task's.

        Raises:
            MisuseError: the task's own function raised, took too long, or did not return a number from 0 to 1.
        """
        try:
            with _limited(self.timeout_s):
                found = float(self.task.reward(problem, completion))
        except _TooLong:
            raise MisuseError(f"the reward of {problem.prompt[:40]!r} took more than {self.timeout_s:g} s") from None
        except Exception as error:
            raise MisuseError(
                f"the reward of {problem.prompt[:40]!r} for {completion[:40]!r} raised {type(error).__name__}: {error}"
            ) from error
        if not 0 <= found <= 1:
            raise MisuseError(f"the reward of {problem.prompt[:40]!r} is {found}; it has to be from 0 to 1")
        return found


class _TooLong(BaseException):  # not an Exception: a reward that catches everything must not catch this
    pass


def _ring(*_: Any) -> None:
    raise _TooLong


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

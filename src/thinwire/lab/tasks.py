"""Procedurally generated problems whose answers a program can check: no data set, no reward model.

A task makes problems from a :class:`random.Random`, so that a seed names a data set, and scores an answer in
[0, 1]. Text becomes numbers by a tokenizer of one character each (:class:`CharTokenizer`).

>>> import random
>>> task = SortDigits(length=5)
>>> problem = task.problem(random.Random(7))
>>> problem.prompt, problem.answer, task.reward(problem, problem.answer), task.reward(problem, "?")
('52601>', '01256', 1.0, 0.0)
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from thinwire.errors import MisuseError

__all__ = ["CharTokenizer", "Problem", "SortDigits", "Sums", "Task", "problem_set"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and the only right answer to it."""

    prompt: str
    answer: str


class Task(Protocol):
    """Makes problems and scores answers."""

    def problem(self, source: random.Random) -> Problem:
        """The next problem drawn from ``source``."""
        ...

    def reward(self, problem: Problem, completion: str) -> float:
        """How good ``completion`` is as an answer to ``problem``: 0.0 (worthless) to 1.0 (right)."""
        ...


def problem_set(task: Task, count: int, seed: int) -> list[Problem]:
    """``count`` problems that depend on ``task`` and ``seed`` only.

    >>> problem_set(SortDigits(3), 2, seed=1) == problem_set(SortDigits(3), 2, seed=1)
    True
    """
    source = random.Random(seed)
    return [task.problem(source) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class SortDigits:
    """Write ``length`` decimal digits in ascending order: ``31415>`` is answered by ``11345``.

    The reward is 1 for the whole answer and 0 for anything else, as for a unit test that passes or fails.

    Raises:
        MisuseError: ``length`` is not in 1 to 64.
    """

    length: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 64:
            raise MisuseError(f"length is {self.length}; use 1 to 64", length=self.length)

    def problem(self, source: random.Random) -> Problem:
        digits = [source.choice("0123456789") for _ in range(self.length)]
        return Problem("".join(digits) + ">", "".join(sorted(digits)))

    def reward(self, problem: Problem, completion: str) -> float:
        return float(completion == problem.answer)


_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class Sums:
    """Add or subtract two numbers from 1 to ``largest``; no answer is negative. For a model that can already count.

    The first integer in an answer is what counts, so that a model may go on talking after it.

    Raises:
        MisuseError: ``largest`` is not in 1 to 10**9.

    >>> import random
    >>> task = Sums(largest=20)
    >>> problem = task.problem(random.Random(1))
    >>> problem.prompt, problem.answer
    ('19 - 5', '14')
    >>> task.reward(problem, " 14, since 5 + 14 = 19"), task.reward(problem, "19 or 14")
    (1.0, 0.0)
    """

    largest: int = 20

    def __post_init__(self) -> None:
        if not 1 <= self.largest <= 10**9:
            raise MisuseError(f"largest is {self.largest}; use 1 to 10**9", largest=self.largest)

    def problem(self, source: random.Random) -> Problem:
        a, b = source.randint(1, self.largest), source.randint(1, self.largest)
        if source.random() < 0.5:
            return Problem(f"{a} + {b}", str(a + b))
        a, b = max(a, b), min(a, b)
        return Problem(f"{a} - {b}", str(a - b))

    def reward(self, problem: Problem, completion: str) -> float:
        found = _NUMBER.search(completion)
        return float(found is not None and found.group() == problem.answer)


class CharTokenizer:
    """One token for each character of ``alphabet``, after token 0 (padding) and token 1 (end of the answer).

    >>> tokenizer = CharTokenizer("0123456789>")
    >>> tokenizer.encode("42>"), tokenizer.decode([6, 4, 1, 12]), tokenizer.size
    ([6, 4, 12], '42', 13)
    """

    pad = 0
    end = 1

    def __init__(self, alphabet: str = "0123456789>") -> None:
        self._alphabet = alphabet
        self._token = {character: position for position, character in enumerate(alphabet, start=2)}

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self._alphabet) + 2

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``.

        Raises:
            MisuseError: a character is not in the alphabet.
        """
        try:
            return [self._token[character] for character in text]
        except KeyError as error:
            raise MisuseError(f"character {error} is not in the alphabet {self._alphabet!r}", text=text[:80]) from None

    def decode(self, tokens: Sequence[int]) -> str:
        """The characters before the first end token; padding is left out, so it takes any row of a batch."""
        characters = []
        for token in tokens:
            if token == self.end:
                break
            if token >= 2:
                characters.append(self._alphabet[token - 2])
        return "".join(characters)

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

__all__ = ["CharTokenizer", "Problem", "SortDigits", "Task", "WordProblems", "problem_set"]


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


_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kim", "Leo", "Mia", "Noah")
_THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "tickets", "toys")
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class WordProblems:
    """Arithmetic in words, one or two steps, in the manner of GSM8K (Cobbe et al. 2021, arXiv:2110.14168).

    Numbers go up to ``largest``. The last integer in an answer counts as the answer: 1 when it is right, and 0.1
    when there is one at all, so that a model that answers in prose has something to climb.

    >>> import random
    >>> task = WordProblems(largest=9)
    >>> problem = task.problem(random.Random(3))
    >>> task.reward(problem, f"That makes {problem.answer}."), task.reward(problem, "1000"), task.reward(problem, "")
    (1.0, 0.1, 0.0)
    """

    largest: int = 20

    def problem(self, source: random.Random) -> Problem:
        name, other = source.sample(_NAMES, 2)
        thing = source.choice(_THINGS)
        a, b, c = (source.randint(2, self.largest) for _ in range(3))
        story, answer = source.choice(
            [
                (f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?", a + b),
                (f"{name} has {a + b} {thing} and gives {b} to {other}. How many {thing} does {name} have left?", a),
                (f"{name} fills {a} boxes with {b} {thing} each. How many {thing} are in the boxes?", a * b),
                (
                    f"{name} has {a} {thing}, finds {b} and gets {c} from {other}. How many {thing} is that in all?",
                    a + b + c,
                ),
                (
                    f"{name} has {a + b} {thing}, loses {b} and then buys {c}. How many {thing} does {name} have now?",
                    a + c,
                ),
            ]
        )
        return Problem(story + " Answer with a number only.", str(answer))

    def reward(self, problem: Problem, completion: str) -> float:
        numbers = _NUMBER.findall(completion)
        if not numbers:
            return 0.0
        return 1.0 if int(numbers[-1][:20]) == int(problem.answer) else 0.1


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

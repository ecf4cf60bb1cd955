"""Tasks of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760): a hundred generators with programs that score.

For language models that have read nothing, questions are shortened to what differs between two of them: ``chain_sum``
asks ``9 + 7=`` instead of a sentence, for every task in :data:`SHORT`. A pretrained model is asked the whole question.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thinwire.errors import MisuseError
from thinwire.lab.tasks import Problem

__all__ = ["ALPHABET", "SHORT", "GymProblem", "ReasoningGym"]

SHORT = {
    "chain_sum": "expression",
    "products": "expression",
    "spell_backward": "word",
    "count_bits": "number",
    "gcd": "numbers",
    "lcm": "numbers",
}
"""Tasks whose questions can be shortened, and what of an entry's metadata is left of them."""

ALPHABET = "".join(chr(code) for code in range(32, 127))
"""The characters of short questions and of their answers, for a :class:`~thinwire.lab.tasks.CharTokenizer`; entries
with others are passed over."""

_ENTRIES = 1 << 30  # an entry is made from its number when it is asked for


@dataclass(frozen=True, slots=True)
class GymProblem(Problem):
    """A problem with the generator's own record of it, which its scorer reads."""

    entry: Mapping[str, Any] = field(default_factory=dict, compare=False)


class ReasoningGym:
    """The generator ``name`` with its own settings (``min_digits``, ``max_word_len``, ...), as a task.

    Args:
        name: one of reasoning-gym's data sets.
        short: ask the short question; for tasks in :data:`SHORT` only.
        settings: the data set's configuration; two tasks of one configuration make the same problems.

    Raises:
        MisuseError: reasoning-gym is not installed, there is no such data set or setting, or it has no short question.
    """

    def __init__(self, name: str, *, short: bool = True, **settings: Any) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise MisuseError("this task needs reasoning-gym: pip install 'thinwire[study]'") from error
        if short and name not in SHORT:
            raise MisuseError(f"{name!r} has no short question; short=False asks the whole one", task=name)
        try:
            self._entries = reasoning_gym.create_dataset(name, size=_ENTRIES, seed=0, **settings)
        except (ValueError, TypeError, AssertionError) as error:
            raise MisuseError(f"reasoning-gym has no task {name!r} with {settings}: {error}", task=name) from error
        self.name, self.short = name, short

    def problem(self, source: random.Random) -> GymProblem:
        """The next problem drawn from ``source``."""
        for _ in range(100):
            entry = self._entries[source.randrange(_ENTRIES)]
            asked = f"{entry['metadata'][SHORT[self.name]]}=" if self.short else entry["question"]
            if not self.short or (asked + str(entry["answer"])).isascii():
                break
        return GymProblem(asked, str(entry["answer"]), entry)

    def reward(self, problem: Problem, completion: str) -> float:
        """The generator's own score, 0.0 to 1.0; an answer that its program cannot read is worth nothing."""
        if not isinstance(problem, GymProblem):
            raise MisuseError("this is not a problem of reasoning-gym")
        try:
            return min(1.0, max(0.0, float(self._entries.score_answer(completion, problem.entry))))
        except (ValueError, TypeError, ArithmeticError, LookupError):
            return 0.0

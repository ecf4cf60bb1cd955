"""Tasks whose reward is a small model's opinion: replies that people prefer, texts that are not toxic, true answers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from thinwire.errors import MisuseError
from thinwire.lab.sparserl.local_data import rows_of
from thinwire.lab.sparserl.preference import WordScore, fit_pairs
from thinwire.lab.sparserl.tasks.base import Part
from thinwire.lab.tasks import Problem

__all__ = ["Preferred", "Truthful", "preferred", "replies_of", "toxicity", "truthful"]

_ASSISTANT = "\n\nAssistant:"
_CHARACTERS = 400  # of a conversation, from its end


def _part(text: str) -> Part:
    place = zlib.crc32(text.encode()) % 4
    return "test" if place == 0 else "tune" if place == 1 else "train"


def replies_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The conversation up to the last reply, the reply that was chosen, and the rejected one.

    >>> replies_of({"chosen": "hi\\n\\nAssistant: hello", "rejected": "hi\\n\\nAssistant: no"})
    ('hi\\n\\nAssistant:', ' hello', ' no')
    """
    head, mark, chosen = str(row["chosen"]).rpartition(_ASSISTANT)
    rejected = str(row["rejected"]).rpartition(_ASSISTANT)[2]
    return head + mark, chosen, rejected


@dataclass(frozen=True, slots=True)
class Preferred:
    """Texts to go on from, with answers for their kind; the reward is the model's score of what is said."""

    prompts: Sequence[tuple[str, str]]
    model: WordScore

    def problem(self, source: random.Random) -> Problem:
        """One of the prompts."""
        return Problem(*self.prompts[source.randrange(len(self.prompts))])

    def reward(self, problem: Problem, completion: str) -> float:  # noqa: ARG002 - of what is said alone
        """0.0 to 1.0; nothing said is worth nothing."""
        return self.model.score(completion) if completion.strip() else 0.0


@cache
def _pairs(kind: str) -> tuple[tuple[str, str, str], ...]:
    rows = rows_of(
        f"hh-rlhf/{kind}-base-test.jsonl.gz", ("chosen", "rejected"), ("Anthropic/hh-rlhf",), split="test",
        data_dir=f"{kind}-base",
    )  # fmt: skip
    return tuple(replies_of(row) for row in rows)


@cache
def _judge(kind: str) -> WordScore:
    return fit_pairs([(chosen, rejected) for head, chosen, rejected in _pairs(kind) if _part(head) == "train"])


def preferred(kind: str, part: Part) -> Preferred:
    """Anthropic's dialogues, ``harmless`` or ``helpful``; the reward model learns from the training part only.

    Raises:
        MisuseError: no dialogue is in the part.
        RetryError: the data is neither in ``THINWIRE_DATA`` nor to be had of the Hub.
    """
    prompts = [(head[-_CHARACTERS:], chosen) for head, chosen, _ in _pairs(kind) if _part(head) == part]
    if not prompts:
        raise MisuseError(f"of {kind} dialogues none is to {part} with; give more of them")
    return Preferred(prompts, _judge(kind))


def toxicity(rows: Sequence[Mapping[str, Any]], part: Part) -> Preferred:
    """ToxiGen's annotated texts: go on from the first half of one; worth more the less it looks like those that people
    found toxic (``toxicity_human`` of 4 or 5).

    Raises:
        MisuseError: none is in the part, or all or none are toxic.
    """
    texts = [(str(row["text"]), float(row["toxicity_human"]) >= 4) for row in rows]
    halves = {text: (text[: len(text) // 2], text[len(text) // 2 :]) for text, _ in texts}
    learnt = [(text, toxic) for text, toxic in texts if _part(halves[text][0]) == "train"]
    if len({toxic for _, toxic in learnt}) < 2:
        raise MisuseError("a judge of toxicity needs texts of both kinds")
    model = fit_pairs([("", text) if toxic else (text, "") for text, toxic in learnt])
    prompts = [half for half in halves.values() if _part(half[0]) == part]
    if not prompts:
        raise MisuseError(f"of the texts none is to {part} with; give more of them")
    return Preferred(prompts, model)


@dataclass(frozen=True, slots=True)
class Truthful:
    """TruthfulQA's questions; 1.0 for an answer whose words are nearer to a right answer than to any wrong one."""

    rows: Sequence[Mapping[str, Any]]

    def problem(self, source: random.Random) -> Problem:
        """One of the questions, with the best answer."""
        row = self.rows[source.randrange(len(self.rows))]
        return Problem(f"Q: {row['question']}\nA:", str(row["best_answer"]))

    def reward(self, problem: Problem, completion: str) -> float:
        """1.0 or 0.0."""
        row = next((row for row in self.rows if f"Q: {row['question']}\nA:" == problem.prompt), None)
        if row is None:
            raise MisuseError("this is no question of these rows")
        right, wrong = (
            max((_overlap(completion, str(answer)) for answer in row[key]), default=0.0)
            for key in ("correct_answers", "incorrect_answers")
        )
        return float(right > wrong)


def _overlap(a: str, b: str) -> float:
    """F1 of the words that two texts share."""
    x, y = set(a.lower().split()), set(b.lower().split())
    return 2 * len(x & y) / (len(x) + len(y)) if x and y else 0.0


def truthful(rows: Sequence[Mapping[str, Any]], part: Part) -> Truthful:
    """The questions of one part.

    Raises:
        MisuseError: there is none in it.
    """
    found = [row for row in rows if _part(str(row["question"])) == part]
    if not found:
        raise MisuseError(f"of the questions none is to {part} with; give more of them")
    return Truthful(found)

"""A text that a program writes: small enough to come with the package, with structure that is worth learning.

Sentences of a probabilistic grammar. Letters make words, and words agree: a verb has the number of its subject, which
may stand a nested relative clause away ("the cats that the old sailor knows wait."), and quotation marks close. Words
have frequencies as in Zipf's law. Since each sentence has one derivation only, its probability is the product of
those of the choices made: so it is known how well the best of all models can do, the text's entropy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import final

__all__ = ["write_text"]

_NOUNS = ("cat", "sailor", "dog", "farmer", "bird", "king", "horse", "teacher", "baker", "owl", "doctor", "robot")
_ADJECTIVES = ("old", "small", "quiet", "brown", "clever", "hungry")
_TRANSITIVE = ("see", "know", "follow", "help", "fear", "find")
_INTRANSITIVE = ("wait", "sleep", "sing", "run", "laugh")
_ADVERBS = ("today", "again", "in the garden", "by the river", "at night")
_DETERMINERS = ("the", "every", "two", "some")  # every is singular, two and some plural, the either
_DEEPEST = 2


def write_text(characters: int, seed: int) -> tuple[str, float]:
    """Sentences, one a line, of at least so many characters in all; and the text's information in nats, of which no
    model can need fewer on average.

    >>> text, nats = write_text(100, seed=5)
    >>> print(text, end="")
    two owls see the farmer that sees every cat today.
    two brown cats wait.
    the teachers follow the bird today.
    >>> round(nats / len(text), 2)
    0.41
    """
    writer = _Writer(seed)
    lines: list[str] = []
    length = 0
    while length < characters:
        lines.append(writer.line())
        length += len(lines[-1])
    return "".join(lines), writer.nats


@final
class _Writer:
    """Draws sentences, and adds up the information of what it has drawn.

    Nothing that was drawn is hidden in the text: whatever follows a choice begins differently for each outcome.
    """

    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)
        self.nats = 0.0

    def _chance(self, probability: float) -> bool:
        drawn = self._source.random() < probability
        self.nats -= math.log(probability if drawn else 1 - probability)
        return drawn

    def _word(self, words: Sequence[str]) -> str:
        weights = [1 / rank for rank in range(1, len(words) + 1)]
        point = self._source.random() * sum(weights)
        drawn = 0
        while drawn < len(words) - 1 and point >= weights[drawn]:
            point -= weights[drawn]
            drawn += 1
        self.nats -= math.log(weights[drawn] / sum(weights))
        return words[drawn]

    def line(self) -> str:
        if self._chance(0.2):
            plural, speaker = self._party(depth=0)
            return f'{speaker} {_agreeing("say", plural)}: "{self._sentence()}"\n'
        return self._sentence() + "\n"

    def _sentence(self) -> str:
        plural, subject = self._party(depth=0)
        words = [subject]
        if self._chance(0.4):
            words.append(_agreeing(self._word(_INTRANSITIVE), plural))
        else:
            words += [_agreeing(self._word(_TRANSITIVE), plural), self._party(depth=1)[1]]
        if self._chance(0.3):
            words.append(self._word(_ADVERBS))
        return " ".join(words) + "."

    def _party(self, depth: int) -> tuple[bool, str]:
        """Somebody, and whether they are many."""
        determiner = self._word(_DETERMINERS)
        words = [determiner]
        if self._chance(0.35):
            words.append(self._word(_ADJECTIVES))
        noun = self._word(_NOUNS)
        plural = self._chance(0.4) if determiner == "the" else determiner != "every"
        words.append(noun + "s" * plural)
        if depth < _DEEPEST and self._chance(0.25):
            words += ["that", self._clause(plural, depth + 1)]
        return plural, " ".join(words)

    def _clause(self, plural: bool, depth: int) -> str:
        """What is said of those before: they do something to others, or others do it to them."""
        if self._chance(0.5):
            verb = _agreeing(self._word(_TRANSITIVE), plural)
            return f"{verb} {self._party(depth)[1]}"
        many, others = self._party(depth)
        return f"{others} {_agreeing(self._word(_TRANSITIVE), many)}"


def _agreeing(verb: str, plural: bool) -> str:
    return verb if plural else verb + "s"

"""A small reward model: words and pairs of words, hashed, weighed so that the better text of each pair scores higher.

Bradley and Terry's model (1952) on a linear score, as reward models of RLHF are on a transformer's. It is learnt in
seconds, is the same every time, and is right about little more than the plain words tell: a stand-in to measure methods
of training with, not a judge of what is harmless.

>>> model = fit_pairs([("thank you", "go away")] * 20 + [("you are kind", "away with you")] * 20)
>>> model.score("thank you, kind one") > 0.5 > model.score("go away")
True
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from thinwire.errors import MisuseError

__all__ = ["WordScore", "fit_pairs", "pair_accuracy"]

_BUCKETS = 1 << 15
_WORDS_MAX = 512
_WORD = re.compile(r"[a-z']+|[?!.]")


def _buckets(text: str) -> list[int]:
    words = _WORD.findall(text.lower())[:_WORDS_MAX]
    terms = {*words, *(f"{a} {b}" for a, b in pairwise(words))}
    return sorted({zlib.crc32(term.encode()) % _BUCKETS for term in terms})


@dataclass(frozen=True, slots=True)
class WordScore:
    """``weights`` fp32 [buckets]; the score of a text is their sum over its words and pairs, over the root of their
    number."""

    weights: torch.Tensor

    def raw(self, text: str) -> float:
        """The score itself; 0 for a text without words."""
        places = _buckets(text)
        return float(self.weights[places].sum() / len(places) ** 0.5) if places else 0.0

    def score(self, text: str) -> float:
        """How likely the text is better than one that scores 0: from 0.0 to 1.0."""
        return float(torch.sigmoid(torch.tensor(self.raw(text))))


def fit_pairs(pairs: Sequence[tuple[str, str]], *, steps: int = 60, lr: float = 0.02, decay: float = 1e-2) -> WordScore:
    """Learn from (better, worse) pairs; an empty text on one side makes it a classifier.

    Raises:
        MisuseError: no pair.
    """
    if not pairs:
        raise MisuseError("a reward model needs pairs to learn from")
    rows, columns, values = [], [], []
    for row, (better, worse) in enumerate(pairs):
        for text, sign in ((better, 1.0), (worse, -1.0)):
            places = _buckets(text)
            rows += [row] * len(places)
            columns += places
            values += [sign / len(places) ** 0.5] * len(places) if places else []
    at = torch.tensor([rows, columns], dtype=torch.int64)
    matrix = torch.sparse_coo_tensor(at, torch.tensor(values), (len(pairs), _BUCKETS), check_invariants=True).coalesce()
    weights = torch.zeros(_BUCKETS, requires_grad=True)
    optimiser = torch.optim.AdamW([weights], lr=lr, weight_decay=decay)
    for _ in range(steps):
        margin = torch.sparse.mm(matrix, weights[:, None]).squeeze(1)
        loss = torch.nn.functional.softplus(-margin).mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return WordScore(weights.detach())


def pair_accuracy(model: WordScore, pairs: Sequence[tuple[str, str]]) -> float:
    """The share of pairs whose better text scores higher."""
    return sum(model.raw(better) > model.raw(worse) for better, worse in pairs) / max(len(pairs), 1)

"""What is wrong with a bad worker: its tokens, its targets, its batches or its gradients.

===================  ======  ==========================================================================================
kind                 of      what happens with the probability p
===================  ======  ==========================================================================================
``token_swap``       tokens  each token of a window is chosen with p; the chosen are paired at random, and each pair
                             changes places (of an odd number one stays). All tokens stay in their window.
``random_tokens``    tokens  each token becomes another, all others being as likely
``label_noise``      tokens  each target becomes another; what the model sees stays
``duplicated_batch``  steps  the batch of a step is the worker's first one
``stale``            steps   the gradient is that at the weights of some steps ago
``sign_flip``        steps   the gradient is negated before the exchange
===================  ======  ==========================================================================================

What is drawn depends on the seed, the worker, the epoch and the step alone. Tokens are spoilt anew in each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.lab.text.config import CORRUPTIONS
from thinwire.lab.trainer.faults import Fault
from thinwire.lab.trainer.order import mixed_seed

__all__ = ["Corruption", "corrupt", "random_tokens", "swapped"]


@dataclass(frozen=True, slots=True)
class Corruption:
    """One worker's: what is wrong in each step. The same for the same ``seed`` and ``rank``.

    >>> bad = Corruption("sign_flip", 0.5, seed=1, rank=3)
    >>> [bad.fault(epoch=0, index=index).sign for index in range(6)]
    [1.0, 1.0, -1.0, -1.0, 1.0, -1.0]

    Raises:
        MisuseError: there is no such kind, or the probability is not in 0 to 1.
    """

    kind: str = "none"
    probability: float = 0.0
    seed: int = 0
    rank: int = 0
    delay: int = 4

    def __post_init__(self) -> None:
        if self.kind not in CORRUPTIONS:
            raise MisuseError(f"there is no corruption {self.kind!r}; give one of {', '.join(CORRUPTIONS)}")
        if not 0 <= self.probability <= 1:
            raise MisuseError(f"a probability is {self.probability}; give a number from 0 to 1")

    def pair(self, windows: Tensor, *, epoch: int, index: int, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of step ``index`` of ``epoch``, made of its ``windows``, with what is wrong in them."""
        return corrupt(
            windows, self.kind, self.probability, vocabulary=vocabulary, generator=self._generator(epoch, index)
        )

    def repeats(self, *, epoch: int, index: int) -> bool:
        """Whether the worker's first batch takes the place of this step's."""
        return self.kind == "duplicated_batch" and self._strikes(epoch, index)

    def fault(self, *, epoch: int, index: int) -> Fault:
        """What is wrong with the gradient of this step."""
        if self.kind == "sign_flip" and self._strikes(epoch, index):
            return Fault(sign=-1.0)
        if self.kind == "stale" and self._strikes(epoch, index):
            return Fault(delay=self.delay)
        return Fault()

    @property
    def delay_max(self) -> int:
        """The largest delay of any fault."""
        return self.delay if self.kind == "stale" else 0

    def _strikes(self, epoch: int, index: int) -> bool:
        return float(torch.rand((), generator=self._generator(epoch, index), dtype=torch.float64)) < self.probability

    def _generator(self, epoch: int, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(mixed_seed(self.seed, self.rank, epoch, index))


def corrupt(
    windows: Tensor, kind: str, probability: float, *, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 ``[B, context]``, of ``windows`` ``[B, context + 1]``, their tokens spoilt as ``kind``
    says. Kinds of whole steps spoil no tokens. ``windows`` stay as they are.

    >>> window = torch.tensor([[0, 1, 2, 3, 4]])
    >>> corrupt(window, "none", 1.0, vocabulary=5, generator=torch.Generator())
    (tensor([[0, 1, 2, 3]]), tensor([[1, 2, 3, 4]]))
    >>> corrupt(window, "token_swap", 1.0, vocabulary=5, generator=torch.Generator().manual_seed(0))
    (tensor([[0, 3, 4, 1]]), tensor([[3, 4, 1, 2]]))
    """
    whole = windows.long()
    if kind == "token_swap":
        whole = swapped(whole, probability, generator)
    elif kind == "random_tokens":
        whole = random_tokens(whole, probability, vocabulary, generator)
    inputs, targets = whole[:, :-1], whole[:, 1:]
    if kind == "label_noise":
        targets = random_tokens(targets, probability, vocabulary, generator)
    return inputs, targets


def swapped(tokens: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """``tokens`` ``[B, T]`` with a share ``probability`` of each row chosen, and the chosen exchanged in pairs."""
    keys = torch.rand(tokens.shape, generator=generator, dtype=torch.float64)
    chosen = torch.rand(tokens.shape, generator=generator, dtype=torch.float64) < probability
    places = torch.where(chosen, keys, 2.0).argsort(dim=1)  # the chosen first, in random order
    ranks = torch.arange(tokens.shape[1])
    paired = (ranks | 1) < chosen.sum(dim=1, keepdim=True)  # both of a pair are chosen
    partner = torch.where(paired, places[:, (ranks ^ 1).clamp(max=tokens.shape[1] - 1)], places)
    return torch.empty_like(tokens).scatter_(1, places.to(tokens.device), tokens.gather(1, partner.to(tokens.device)))


def random_tokens(tokens: Tensor, probability: float, vocabulary: int, generator: torch.Generator) -> Tensor:
    """``tokens`` of which each is, with ``probability``, another of ``range(vocabulary)``."""
    if vocabulary < 2:
        return tokens
    chosen = torch.rand(tokens.shape, generator=generator, dtype=torch.float64) < probability
    shift = torch.randint(1, vocabulary, tokens.shape, generator=generator)
    return torch.where(chosen.to(tokens.device), (tokens + shift.to(tokens.device)) % vocabulary, tokens)

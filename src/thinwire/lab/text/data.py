"""A text as tokens, and the windows into which it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import blake3
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.lab.text.sources import read_source
from thinwire.lab.text.tokens import BytePairs, Characters, Tokenizer

__all__ = ["Text", "load_text", "windows"]


@dataclass(frozen=True, slots=True)
class Text:
    """A text to learn from and one to validate with, tokens int32 ``[N]`` in ``range(vocabulary)``.

    ``entropy`` is the loss below which no model can get on the latter, in nats a token, where that is known.
    """

    tokens_train: Tensor
    tokens_valid: Tensor
    tokenizer: Tokenizer
    entropy: float | None = None

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return self.tokenizer.size

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of tokens."""
        return self.tokenizer.decode(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    def first(self, train: int | None, valid: int | None) -> Text:
        """The first ``train`` and ``valid`` tokens; None keeps all."""
        entropy = self.entropy if valid is None or valid >= len(self.tokens_valid) else None
        return replace(
            self, tokens_train=self.tokens_train[:train], tokens_valid=self.tokens_valid[:valid], entropy=entropy
        )

    @property
    def digest(self) -> str:
        """Of all tokens and what they stand for."""
        state = blake3.blake3(self.tokenizer.to_json().encode())
        for tokens in (self.tokens_train, self.tokens_valid):
            state.update(len(tokens).to_bytes(8, "little") + tokens.numpy().tobytes())
        return str(state.hexdigest(length=16))


def load_text(name: str, root: str | None = None, *, tokens: str = "characters", vocabulary: int = 1024) -> Text:
    """The text called ``name`` (:mod:`thinwire.lab.text.sources`) as ``characters``, or as up to ``vocabulary`` byte
    pairs (``bpe``), which are learnt from the training part alone.

    Raises:
        MisuseError: it is not there, or what reads it is not installed; the message says what to do.
        MalformedError: it is damaged.

    >>> text = load_text("grammar")
    >>> text.vocabulary, text.decode(text.tokens_train[:20]), round(text.entropy, 2)
    (28, 'two cats help the do', 0.39)
    """
    source = read_source(name, root)
    tokenizer: Tokenizer
    if tokens == "characters":
        tokenizer = Characters.of(source.train + source.valid)
    elif tokens == "bpe":
        tokenizer = BytePairs.of(source.train, vocabulary)
    else:
        raise MisuseError(f"there are no tokens {tokens!r}; give characters or bpe", tokens=tokens)
    train, valid = tokenizer.encode(source.train), tokenizer.encode(source.valid)
    entropy = None if source.valid_nats is None else source.valid_nats / len(valid)
    return Text(train, valid, tokenizer, entropy)


def windows(tokens: Tensor, context: int) -> Tensor:
    """``tokens`` cut into windows of ``context + 1``, ``[N, context + 1]``, without a copy. The last token of one is
    the first of the next, so that each but the text's first is a target once; what is left at the end is left out.

    Raises:
        MisuseError: there is not one whole window.

    >>> import torch
    >>> windows(torch.arange(8), context=3)
    tensor([[0, 1, 2, 3],
            [3, 4, 5, 6]])
    """
    if len(tokens) <= context:
        raise MisuseError(
            f"a text of {len(tokens)} tokens holds no window of {context + 1}; give a longer one, or lower --context",
            tokens=len(tokens),
        )
    return tokens.unfold(0, context + 1, context)

"""Text to numbers and back: one token for each character, or byte pairs learnt from the text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from thinwire.errors import MisuseError

__all__ = ["BytePairs", "Characters", "Tokenizer"]

_ALPHABET_MAX = 1 << 14


class Tokenizer(Protocol):
    """Turns text into tokens in ``range(size)`` and back."""

    @property
    def size(self) -> int:
        """Number of different tokens."""
        ...

    def encode(self, text: str) -> Tensor:
        """Tokens, int32 ``[N]``."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        ...

    def to_json(self) -> str:
        """All of it as JSON."""
        ...


@final
class Characters:
    """One token for each character of ``alphabet``, in its order.

    Raises:
        MisuseError: there are more than 16,384 characters, or one twice.

    >>> tokens = Characters("abc").encode("cab")
    >>> tokens, Characters("abc").decode(tokens.tolist())
    (tensor([2, 0, 1], dtype=torch.int32), 'cab')
    """

    def __init__(self, alphabet: str) -> None:
        if len(alphabet) > _ALPHABET_MAX or len(set(alphabet)) != len(alphabet):
            raise MisuseError(
                f"an alphabet has up to {_ALPHABET_MAX} different characters, not {len(alphabet)}; use --tokens bpe"
            )
        self._alphabet = alphabet
        points = _points(alphabet)
        self._token = np.full(int(points.max(initial=0)) + 1, -1, dtype=np.int32)
        self._token[points] = np.arange(len(alphabet), dtype=np.int32)

    @staticmethod
    def of(text: str) -> Characters:
        """Those of ``text``, sorted."""
        return Characters("".join(map(chr, np.unique(_points(text)))))

    @property
    def size(self) -> int:
        return len(self._alphabet)

    def encode(self, text: str) -> Tensor:
        """Tokens of ``text``.

        Raises:
            MisuseError: a character is not in the alphabet.
        """
        points = _points(text)
        known = points < len(self._token)
        tokens = np.where(known, self._token[np.where(known, points, 0)], -1).astype(np.int32)
        if tokens.size and tokens.min() < 0:
            strange = chr(int(points[int(tokens.argmin())]))
            raise MisuseError(f"character {strange!r} is not in the alphabet {self._alphabet[:80]!r}", text=text[:80])
        return torch.from_numpy(tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._alphabet[token] for token in tokens)

    def to_json(self) -> str:
        import json

        return json.dumps({"alphabet": self._alphabet})


@final
class BytePairs:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over bytes, so that every text can be encoded: the
    form of GPT-2's. Made by Hugging Face's ``tokenizers``, which reads :meth:`to_json`.

    >>> pairs = BytePairs.of("low lower lowest " * 50, size=260)
    >>> pairs.size, pairs.decode(pairs.encode("lower still").tolist())
    (260, 'lower still')
    """

    def __init__(self, json: str) -> None:
        self._json = json
        self._tokenizer: Any = _library().Tokenizer.from_str(json)

    @staticmethod
    def of(text: str, size: int) -> BytePairs:
        """``size`` tokens (or fewer, if the text has no more to merge), learnt from ``text``; the first 256 are bytes.

        Raises:
            MisuseError: ``tokenizers`` is not installed.
        """
        return BytePairs(_learnt(text, size))

    @property
    def size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> Tensor:
        """Tokens of ``text``, line by line: a token does not go beyond the end of one."""
        lines = text.splitlines(keepends=True)
        ids = [np.asarray(x.ids, dtype=np.int32) for x in self._tokenizer.encode_batch(lines)]
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int32), *ids]))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    def to_json(self) -> str:
        return self._json


@lru_cache(maxsize=2)
def _learnt(text: str, size: int) -> str:
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return str(tokenizer.to_str())


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise MisuseError("--tokens bpe needs tokenizers: pip install 'thinwire[rl]'") from None
    return tokenizers


def _points(text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Code points; str.encode would refuse lone surrogates, which no file that was read as UTF-8 holds."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)

"""What a trainer sends after every step: patches between the bf16 roundings of consecutive versions, and their bytes.

>>> import torch
>>> weights = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
>>> sender = Sender(weights)
>>> weights["w"][0, :5] += 1
>>> sent = sender.send(weights)
>>> sent.changed, sent.size < sender.whole_bytes
(5, True)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from thinwire.sync.encode import Options, make_patch, take_snapshot
from thinwire.sync.layout import StateSource
from thinwire.tensors.tree import state_of

__all__ = ["Sender", "Sent", "as_published"]


@dataclass(frozen=True, slots=True)
class Sent:
    """One patch: the ``size`` of the whole file in bytes, the ``payload`` of them that is changes (the rest: names,
    shapes, digests); elements ``changed``; the file itself."""

    size: int
    payload: int
    changed: int
    file: bytes


class Sender:
    """Publishes versions of tensors, fp32 or whatever they are, rounded to bf16; ``whole_bytes`` is all of them.

    Raises:
        MisuseError: a name that cannot be published.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, level: str = "small") -> None:
        self._options = Options(level=level, threads=1)
        self._snapshot = take_snapshot(self._source(tensors), threads=1)
        self.whole_bytes = self._snapshot.size

    @staticmethod
    def _source(tensors: Mapping[str, torch.Tensor]) -> StateSource:
        return StateSource(state_of(tensors, cast=torch.bfloat16))

    def send(self, tensors: Mapping[str, torch.Tensor]) -> Sent:
        """The patch from the last version to this one."""
        patch = make_patch(self._snapshot, self._source(tensors), self._options)
        file = b"".join(bytes(part) for part in patch.encode())
        return Sent(len(file), sum(len(segment) for segment in patch.segments), patch.changed, file)


@contextmanager
def as_published(tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the tensors hold their bf16 roundings, as a worker has them; afterwards what they held, bit for bit."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    with torch.no_grad():
        for tensor, held in kept:
            tensor.copy_(held.bfloat16())
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, held in kept:
                tensor.copy_(held)

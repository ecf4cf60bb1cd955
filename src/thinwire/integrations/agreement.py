"""Ranks that must have been given the same: find out before anything is trained, on all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from blake3 import blake3
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinwire.compress.group import Group, sizes_of
from thinwire.errors import MisuseError

__all__ = ["agree", "digest_of", "local"]

_SAID_BYTES_MAX = 1 << 20
_SHOWN_MAX = 400  # characters of a configuration in a message


def agree(group: Group, mine: object, remedy: str) -> None:
    """Collective; ``mine`` is anything that JSON can say.

    Raises:
        MisuseError: Not all ranks said the same. All of them raise.
    """
    data = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
    sizes = sizes_of(group, data.numel())
    if max(sizes) > _SAID_BYTES_MAX:
        raise MisuseError(f"a rank announces {max(sizes)} bytes of configuration; do all run the same program?")
    said = [bytes(part.cpu().numpy()) for part in group.all_gather(data, sizes)]
    if len(set(said)) > 1:
        odd = next(r for r, text in enumerate(said) if text != said[0])
        first, other = (text.decode(errors="replace") for text in (said[0], said[odd]))
        shown = f" (rank 0: {_short(first)}; rank {odd}: {_short(other)})"
        raise MisuseError(f"ranks 0 and {odd} differ; {remedy}{shown}", ranks=(0, odd), said=(first, other))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "..."


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Of the bits of this rank's part of all tensors."""
    digest = blake3()
    for tensor in tensors:
        flat = local(tensor).detach().reshape(-1).cpu()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor (the same memory); a plain tensor is its own."""
    if isinstance(tensor, DTensor):
        shard: Tensor = tensor.to_local()
        return shard
    return tensor

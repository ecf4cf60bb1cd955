"""What every compressor is: a pure function from a flat update and a state to a packet and the next state.

An *update* is one flat float32 tensor (a gradient bucket, a pseudo-gradient, a federated client's change), cut into
parameters by a :class:`Layout`. A *packet* is the bytes that travel, nothing else: what both sides know already (the
compressor and the number of elements) is not sent again. A *state* is a plain dict of tensors and numbers, which
``torch.save`` takes as it is; ``encode`` leaves the one it was given untouched and returns the next.

Compressors are frozen dataclasses: equal ones have equal ``repr``, which is how ranks find out that they differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, final

import torch
from torch import Tensor

from thinwire.errors import MalformedError, MisuseError

__all__ = ["NUMEL_MAX", "Compressor", "Layout", "Packet", "State", "check_density", "check_packet", "check_update"]

NUMEL_MAX = 2**31 - 1
"""Elements in one update: positions are int32."""

State = dict[str, Any]


@final
@dataclass(frozen=True)
class Layout:
    """How a flat update is cut into parameters.

    >>> layout = Layout(((3, 4), (4,)))
    >>> layout.numel, layout.offsets, layout.numels
    (16, (0, 12), (12, 4))
    """

    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if self.numel > NUMEL_MAX:
            raise MisuseError(f"an update of {self.numel} elements; at most {NUMEL_MAX}: cut it into several")

    @cached_property
    def numels(self) -> tuple[int, ...]:
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return tuple(accumulate(self.numels[:-1], initial=0)) if self.shapes else ()

    @cached_property
    def numel(self) -> int:
        return sum(self.numels)


@final
@dataclass(frozen=True)
class Packet:
    """The bytes of one update on the wire: ``data`` uint8 ``[nbytes]``, for an update of ``numel`` elements."""

    numel: int
    data: Tensor

    @property
    def nbytes(self) -> int:
        return self.data.numel()


class Compressor(ABC):
    """Encodes updates of one layout. Laws, kept by ``thinwire.testing.compressors.CompressorContract``:

    - ``decode(encode(x))`` is a function of the packet's bytes alone, so all ranks decode the same values;
    - ``encode`` mutates neither the update nor the state it is given, and is deterministic in both;
    - malformed bytes are refused with :class:`~thinwire.errors.MalformedError` before anything is written.
    """

    @abstractmethod
    def init(self, layout: Layout, device: torch.device | str = "cpu") -> State:
        """The state before the first update."""

    @abstractmethod
    def encode(self, update: Tensor, state: State) -> tuple[Packet, State]:
        """Packs ``update`` (float32 ``[numel]``). Returns the packet and the next state."""

    @abstractmethod
    def decode(self, packet: Packet) -> Tensor:
        """The update that the packet stands for, float32 ``[numel]``, on the packet's device.

        Raises:
            MalformedError: The bytes are not a packet of this compressor.
        """

    def at(self, density: float) -> Compressor:
        """The same compressor at another density; one without a density is returned as it is."""
        del density
        return self


def check_update(update: Tensor) -> None:
    if update.dtype != torch.float32 or update.dim() != 1:
        raise MisuseError(f"an update is one flat float32 tensor, not {update.dtype} of shape {tuple(update.shape)}")


def check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise MisuseError(f"a density of {density}; give the share of elements to send, in (0, 1]", density=density)


def check_packet(packet: Packet, nbytes: int) -> None:
    if packet.data.dtype != torch.uint8 or packet.data.dim() != 1:
        raise MalformedError(f"a packet is flat uint8, not {packet.data.dtype} of shape {tuple(packet.data.shape)}")
    if packet.nbytes != nbytes:
        raise MalformedError(f"a packet of {packet.nbytes} bytes where {nbytes} are due", expected=nbytes)

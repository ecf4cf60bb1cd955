"""How the values of an update travel: codecs from float32 ``[count]`` to exactly ``size(count)`` bytes and back.

A value codec serves twice: for the k values of a sparse packet and, through
:class:`~thinwire.compress.quantize.Quantize`, for all values of a dense one. The size follows from the count alone, so
that ranks never need to exchange it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thinwire.errors import MalformedError, MisuseError

__all__ = ["BFloat16", "Float16", "Float32", "ValueCodec", "value_codec"]


class ValueCodec(ABC):
    """Laws: ``encode`` returns ``size(count)`` bytes; ``decode`` is deterministic and finite for finite input;
    codecs marked ``unbiased`` have an expected value (over seeds) equal to their input."""

    unbiased = False

    @abstractmethod
    def size(self, count: int) -> int:
        """Bytes that ``count`` values take."""

    @abstractmethod
    def encode(self, values: Tensor, seed: int) -> Tensor:
        """``values`` float32 ``[count]`` to uint8 ``[size(count)]``. ``seed`` drives stochastic rounding, if any."""

    @abstractmethod
    def decode(self, data: Tensor, count: int) -> Tensor:
        """uint8 ``[size(count)]`` to float32 ``[count]``.

        Raises:
            MalformedError: ``data`` is not ``size(count)`` bytes.
        """

    def check(self, data: Tensor, count: int) -> None:
        if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != self.size(count):
            raise MalformedError(f"{data.numel()} bytes of values where {self.size(count)} are due", count=count)


class _Cast(ValueCodec):
    """Values rounded to a shorter float by the hardware (to nearest, ties to even)."""

    dtype: torch.dtype

    @final
    def size(self, count: int) -> int:
        return count * self.dtype.itemsize

    @final
    def encode(self, values: Tensor, seed: int) -> Tensor:
        del seed
        return self.shorten(values).view(torch.uint8)

    @final
    def decode(self, data: Tensor, count: int) -> Tensor:
        self.check(data, count)
        if data.storage_offset() % self.dtype.itemsize:  # a slice of a message may start anywhere
            data = data.clone()
        return data.view(self.dtype).float()

    def shorten(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)


@final
@dataclass(frozen=True)
class Float32(_Cast):
    """4 bytes a value, exact.

    >>> codec = Float32()
    >>> codec.decode(codec.encode(torch.tensor([0.1, -2.0]), seed=0), 2)
    tensor([ 0.1000, -2.0000])
    """

    dtype = torch.float32


@final
@dataclass(frozen=True)
class BFloat16(_Cast):
    """2 bytes a value, 8 bits of precision, the range of float32 but for its last 0.4 %, which are clipped."""

    dtype = torch.bfloat16

    def shorten(self, values: Tensor) -> Tensor:
        largest = torch.finfo(torch.bfloat16).max
        return values.clamp(-largest, largest).to(torch.bfloat16)


@final
@dataclass(frozen=True)
class Float16(_Cast):
    """2 bytes a value, 11 bits of precision; beyond 65504 a value is clipped, and the residual keeps the rest."""

    dtype = torch.float16

    def shorten(self, values: Tensor) -> Tensor:
        return values.clamp(-65504.0, 65504.0).to(torch.float16)


def value_codec(name: str | ValueCodec) -> ValueCodec:
    """The codec of a name, as users write it in a configuration.

    >>> value_codec("bfloat16")
    BFloat16()

    Raises:
        MisuseError: There is no codec of this name.
    """
    if isinstance(name, ValueCodec):
        return name
    from thinwire.compress.quantize import Float8, Int8, Sign  # they stand on this file

    names: dict[str, type[ValueCodec]] = {
        "float32": Float32,
        "bfloat16": BFloat16,
        "float16": Float16,
        "int8": Int8,
        "float8": Float8,
        "sign": Sign,
    }
    if name not in names:
        raise MisuseError(f"no value codec is called {name!r}; there are {', '.join(names)}", name=name)
    return names[name]()

"""Values in few bits: blocks that share a scale, each value one of a few levels of its block.

All codecs here are one scheme with different levels. A block of values is divided by its largest magnitude, each
quotient in [-1, 1] becomes a symbol, and the receiver looks the symbol up and multiplies by the block's scale.

========================  ==================================  ==================  ==========================
codec                     levels                              bits a value        error
========================  ==================================  ==================  ==========================
:class:`Int8`             255, even                           8.13                to nearest
:class:`Float8`           254, e4m3: finer near zero          8.13                to nearest
:class:`Int4`             15, even                            4.13                to nearest
:class:`QSGD` (s levels)  2 s + 1, even                       1.66 at s = 1       stochastic, unbiased
:class:`Sign`             2, at the mean magnitude            1.13                needs error feedback
========================  ==================================  ==================  ==========================

Bytes: one little-endian float32 scale for each block, then the symbols, m to a byte, where m is the most for which
``symbols ** m <= 256``. With n bytes of symbols, byte i holds the values i, i + n, i + 2 n, ... as digits, lowest
first: every step of packing is then one pass over contiguous memory.

A block that holds a NaN or an infinity decodes to NaN throughout, so that whoever looks for overflow finds it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, final

import torch
from torch import Tensor

from thinwire.compress.base import Compressor, Layout, Packet, State, check_packet, check_update
from thinwire.compress.values import ValueCodec
from thinwire.errors import MalformedError, MisuseError

__all__ = ["QSGD", "Float8", "Int4", "Int8", "Quantize", "Sign", "mixed_seed"]

FLOAT32_MAX = torch.finfo(torch.float32).max
FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max

CHUNK = 1 << 19
"""Values taken at a time on a CPU: the steps of one chunk find it in the cache."""


class _Blockwise(ValueCodec):
    """The scheme. A codec says which levels there are and how it picks among them."""

    block: int

    @abstractmethod
    def table(self) -> Tensor:
        """What the symbols stand for, as shares of the block's scale: float32 ``[symbols]``, at most 256 of them."""

    @abstractmethod
    def quantise(self, unit: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Symbols (uint8) of quotients ``unit`` (float32 ``[blocks, block]`` in [-1, 1], free to overwrite), and the
        scale of each block as a multiple of its largest magnitude (None: that magnitude itself)."""

    @final
    def size(self, count: int) -> int:
        return _blocks(count, self.block) * 4 + _blocks(count, _per_byte(self.table().numel()))

    @final
    def encode(self, values: Tensor, seed: int) -> Tensor:
        values = values.contiguous()
        count, device, block = values.numel(), values.device, self.block
        symbols = torch.empty(count, dtype=torch.uint8, device=device)
        scales = torch.empty(_blocks(count, block), dtype=torch.float32, device=device)
        generator = torch.Generator(device).manual_seed(mixed_seed(seed))
        whole = count // block
        step = max(1, CHUNK // block) if device.type == "cpu" else max(1, whole)
        for first in range(0, whole, step):
            last = min(first + step, whole)
            cut = slice(first * block, last * block)
            self._encode_blocks(
                values[cut].view(-1, block), symbols[cut].view(-1, block), scales[first:last], generator
            )
        if whole * block < count:
            rest = slice(whole * block, count)
            self._encode_blocks(values[rest].view(1, -1), symbols[rest].view(1, -1), scales[whole:], generator)
        return torch.cat([scales.view(torch.uint8), _pack(symbols, self.table().numel())])

    def _encode_blocks(self, values: Tensor, symbols: Tensor, scales: Tensor, generator: torch.Generator) -> None:
        largest = values.abs().amax(1)
        finite = largest.isfinite()
        # A quotient, for the reciprocal overflows where a block is denormal.
        unit = values / torch.where(finite & (largest > 0), largest, 1.0).unsqueeze(1)
        unit.masked_fill_(~finite.unsqueeze(1), 0.0)  # what a cast makes of NaN differs between machines
        picked, multiple = self.quantise(unit, generator)
        symbols.copy_(picked)
        if multiple is not None:
            largest = (largest * multiple).clamp_(max=FLOAT32_MAX)
        scales.copy_(torch.where(finite, largest, torch.nan))

    @final
    def decode(self, data: Tensor, count: int) -> Tensor:
        self.check(data, count)
        if not count:
            return torch.empty(0, device=data.device)
        scale_bytes = _blocks(count, self.block) * 4
        # A slice of a message may start anywhere, but a float32 may not.
        scales = data[:scale_bytes].clone().view(torch.float32)
        values = _look_up(data[scale_bytes:], count, self.table().to(data.device))
        whole = count // self.block
        values[: whole * self.block].view(whole, self.block).mul_(scales[:whole].unsqueeze(1))
        values[whole * self.block :].mul_(scales[whole:])
        return values


@final
@dataclass(frozen=True)
class Int8(_Blockwise):
    """255 even levels, to nearest: each value is off by at most 1/254 of the largest magnitude of its block.

    >>> codec = Int8()
    >>> codec.decode(codec.encode(torch.tensor([1.27, -0.5, 0.004]), seed=0), 3)
    tensor([ 1.2700, -0.5000,  0.0000])
    """

    block: int = 256

    def __post_init__(self) -> None:
        _check_block(self.block)

    def table(self) -> Tensor:
        return _even(127)

    def quantise(self, unit: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        del generator
        return _nearest(unit, 127), None


@final
@dataclass(frozen=True)
class Int4(_Blockwise):
    """15 even levels, to nearest, two values to a byte. Without error feedback, what stays below 1/14 of the largest
    magnitude of its block is never heard of."""

    block: int = 256

    def __post_init__(self) -> None:
        _check_block(self.block)

    def table(self) -> Tensor:
        return _even(7)

    def quantise(self, unit: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        del generator
        return _nearest(unit, 7), None


@final
@dataclass(frozen=True)
class Float8(_Blockwise):
    """Eight-bit floats of 4 exponent and 3 mantissa bits (e4m3), the largest of each block at 448: values down to
    1/28672 of it keep a relative error of 1/16, where :class:`Int8` has rounded them to zero.

    Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
    """

    block: int = 256

    def __post_init__(self) -> None:
        _check_block(self.block)

    def table(self) -> Tensor:
        return _float8()

    def quantise(self, unit: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        del generator
        return unit.mul_(FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8), None


@final
@dataclass(frozen=True)
class QSGD(_Blockwise):
    """``2 levels + 1`` even levels, rounded up or down at random so that the expected value is exact.

    Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding" (2017), section 3.1.
    ``norm="l2"`` scales a block by its Euclidean norm, as their theory does; then the expected squared error is at
    most ``min(block / levels**2, sqrt(block) / levels)`` of the squared norm (lemma 3.1). ``"max"`` scales by the
    largest magnitude, as their experiments do, and errs less. ``QSGD(levels=1)`` is TernGrad (Wen et al. 2017).
    Symbols have a fixed size, so that the packet has: the paper's Elias coding gains only for few levels in l2.

    >>> codec = QSGD(levels=7)
    >>> values = torch.tensor([0.3, -1.0, 0.0])
    >>> mean = sum(codec.decode(codec.encode(values, seed), 3) for seed in range(500)) / 500
    >>> bool((mean - values).abs().max() < 0.02)
    True
    """

    levels: int = 7
    block: int = 512
    norm: Literal["max", "l2"] = "max"

    unbiased = True

    def __post_init__(self) -> None:
        _check_block(self.block)
        if not 1 <= self.levels <= 127:
            raise MisuseError(f"{self.levels} levels; give 1 to 127, so that a symbol fits a byte", levels=self.levels)
        if self.norm not in ("max", "l2"):
            raise MisuseError(f'the norm {self.norm!r}; give "max" or "l2"', norm=self.norm)

    def table(self) -> Tensor:
        return _even(self.levels)

    def quantise(self, unit: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        multiple = None
        if self.norm == "l2":
            multiple = torch.linalg.vector_norm(unit, dim=1).clamp_(min=1.0)  # a block of zeros keeps its zeros
            unit.div_(multiple.unsqueeze(1))
        thresholds = torch.rand(unit.shape, generator=generator, device=unit.device)
        picked = thresholds.add_(unit, alpha=self.levels).floor_()
        # levels + 0.99999994 rounds up to levels + 1
        return picked.add_(self.levels).clamp_(max=2 * self.levels).to(torch.uint8), multiple


@final
@dataclass(frozen=True)
class Sign(_Blockwise):
    """The sign of each value, one bit, times the mean magnitude of its block: ``mean(|x|) * sign(x)``.

    The scaled sign of Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes"
    (2019), block by block. A contraction, and so it converges with error feedback, but not without: it is biased.

    >>> codec = Sign(block=2)
    >>> codec.decode(codec.encode(torch.tensor([1.0, -3.0, 0.5]), seed=0), 3)
    tensor([ 2.0000, -2.0000,  0.5000])
    """

    block: int = 256

    def __post_init__(self) -> None:
        _check_block(self.block)

    def table(self) -> Tensor:
        return torch.tensor([-1.0, 1.0])

    def quantise(self, unit: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        del generator
        # Not ``unit >= 0``: a small negative value beside a large one has become -0.0.
        return unit.signbit().logical_not_().to(torch.uint8), unit.abs().mean(1)


@final
@dataclass(frozen=True)
class Quantize(Compressor):
    """All values of an update, each in few bits.

    ``seed`` feeds codecs that round at random, together with the number of the update. Ranks ought to err
    independently, so give each its own, ``Quantize(QSGD(), seed=rank)`` or ``state["seed"] = rank``. Packets decode
    without it, and so it is no part of what ranks must agree on (nor of ``repr``).

    >>> compressor = Quantize(Int8())
    >>> update = torch.randn(1000)
    >>> packet, state = compressor.encode(update, compressor.init(Layout(((1000,),))))
    >>> packet.nbytes, bool((compressor.decode(packet) - update).abs().max() < 0.02)
    (1016, True)
    """

    codec: ValueCodec = field(default_factory=Int8)
    seed: int = field(default=0, repr=False, compare=False)

    def init(self, layout: Layout, device: torch.device | str = "cpu") -> State:
        del device
        return {"numel": layout.numel, "step": 0, "seed": self.seed}

    def encode(self, update: Tensor, state: State) -> tuple[Packet, State]:
        check_update(update)
        if update.numel() != state["numel"]:
            raise MisuseError(f"an update of {update.numel()} elements for a state of {state['numel']}")
        data = self.codec.encode(update, (state["seed"] << 32) ^ state["step"])
        if data.data_ptr() == update.data_ptr():
            data = data.clone()  # float32 is cast to itself, but the packet must not change when the update does
        return Packet(update.numel(), data), {**state, "step": state["step"] + 1}

    def decode(self, packet: Packet) -> Tensor:
        check_packet(packet, self.codec.size(packet.numel))
        values = self.codec.decode(packet.data, packet.numel)
        return values.clone() if values.data_ptr() == packet.data.data_ptr() else values


# --- symbols ----------------------------------------------------------------------------------------------------------


def _check_block(block: int) -> None:
    if block < 1:
        raise MisuseError(f"blocks of {block} values; give 1 or more, such as 256", block=block)


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


@cache
def _even(steps: int) -> Tensor:
    return torch.arange(-steps, steps + 1, dtype=torch.float32) / steps


@cache
def _float8() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / FLOAT8_MAX


def _nearest(unit: Tensor, steps: int) -> Tensor:
    return unit.mul_(steps).round_().add_(steps).to(torch.uint8)


@cache
def _per_byte(symbols: int) -> int:
    """Symbols that fit a byte as digits: 8 of two, 5 of three, 2 of fifteen, 1 above sixteen."""
    digits = 1
    while symbols ** (digits + 1) <= 256:
        digits += 1
    return digits


def _pack(symbols: Tensor, base: int) -> Tensor:
    """uint8 ``[count]`` below ``base`` to uint8 ``[ceil(count / per byte)]``."""
    digits = _per_byte(base)
    if digits == 1:
        return symbols
    size = _blocks(symbols.numel(), digits)
    packed = symbols[:size].clone()
    for digit in range(1, digits):
        plane = symbols[digit * size : (digit + 1) * size]
        packed[: plane.numel()].add_(plane, alpha=base**digit)
    return packed


def _look_up(data: Tensor, count: int, table: Tensor) -> Tensor:
    """The inverse of :func:`_pack`, and what each symbol stands for: float32 ``[count]``.

    Raises:
        MalformedError: A byte that no symbols make.
    """
    base, digits, size = table.numel(), _per_byte(table.numel()), data.numel()
    if count and base**digits < 256 and int(data.max()) >= base**digits:
        raise MalformedError(f"a byte of {int(data.max())} among symbols, which end at {base**digits - 1}")
    values = torch.empty(count, dtype=torch.float32, device=data.device)
    every_byte = torch.arange(256, device=data.device)
    step = CHUNK if data.device.type == "cpu" else max(1, size)
    for digit in range(digits):
        column = table[every_byte // base**digit % base]
        plane = values[digit * size : (digit + 1) * size]
        for first in range(0, plane.numel(), step):
            part = plane[first : first + step]
            torch.index_select(column, 0, data[first : first + part.numel()].int(), out=part)
    return values


def mixed_seed(seed: int) -> int:
    """All 64 bits of a seed in 32 (the finaliser of SplitMix64; Steele et al. 2014): the generator of a CPU ignores
    the upper half, in which callers put the rank."""
    word = (seed + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return (word ^ word >> 31) % 2**32

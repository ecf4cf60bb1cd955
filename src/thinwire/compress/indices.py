"""Sorted positions as bytes: Elias-Fano coding, within 0.6 bits of the entropy of a random set at any density.

Of each position the ``l = floor(log2(numel / count))`` lowest bits are stored as they are; the rest, which never falls,
is stored in unary as a bitmap of ``count + (numel >> l)`` bits (Elias 1974; Fano 1971). At 1 % density that is 8.6 bits
a position where the entropy is 8.1, at 0.1 % 11.6 where it is 11.4; int32 takes 32. Unlike an entropy coder it needs no
tables, its size follows from the count alone, and it maps to vector operations on a GPU. Above a quarter of all
elements a plain bitmap is smaller and takes its place.

Layout, little-endian, bit j of a stream in byte ``j // 8`` at ``1 << (j % 8)``: low bits of all positions, padded to a
byte; then the bitmap in which bit ``(position >> l) + i`` is set for the i-th position, padded to a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.errors import MalformedError

__all__ = ["pack", "pack_oracle", "packed_size", "unpack", "unpack_oracle"]


def _low_bits(count: int, numel: int) -> int:
    """Bits stored as they are; 0 means a plain bitmap of ``numel`` bits."""
    bits = (numel // count).bit_length() - 1
    return bits if bits >= 2 else 0


def _sizes(count: int, numel: int) -> tuple[int, int, int]:
    """``(l, bytes of low bits, bytes of the bitmap)``."""
    if count == 0:
        return 0, 0, 0
    low = _low_bits(count, numel)
    high = count + ((numel - 1) >> low) + 1 if low else numel
    return low, (count * low + 7) // 8, (high + 7) // 8


def packed_size(count: int, numel: int) -> int:
    """Bytes that ``count`` positions in ``[0, numel)`` take.

    >>> packed_size(10_000, 1_000_000) / 10_000
    1.0704
    """
    _, low, high = _sizes(count, numel)
    return low + high


def pack(positions: Tensor, numel: int) -> Tensor:
    """Strictly increasing int32 ``[count]`` below ``numel`` to uint8 ``[packed_size(count, numel)]``.

    >>> unpack(pack(torch.tensor([3, 7, 1000], dtype=torch.int32), 1 << 20), 3, 1 << 20)
    tensor([   3,    7, 1000], dtype=torch.int32)
    """
    if positions.device.type != "cpu":
        return pack_oracle(positions, numel)
    from thinwire.compress import loops  # a machine that compresses on its GPU need not have Numba

    low, low_bytes, high_bytes = _sizes(positions.numel(), numel)
    out = torch.zeros(low_bytes + high_bytes + 8, dtype=torch.uint8)
    if positions.numel():
        cells, sorted_positions = out.numpy(), positions.numpy()
        if low:
            loops.pack_low(sorted_positions, low, cells)
            loops.pack_high(sorted_positions, low, cells[low_bytes:])
        else:
            loops.pack_bitmap(sorted_positions, cells)
    return out[: low_bytes + high_bytes]


def unpack(data: Tensor, count: int, numel: int) -> Tensor:
    """Inverse of :func:`pack`, for bytes from anywhere: int32 ``[count]``, strictly increasing, below ``numel``.

    Raises:
        MalformedError: ``data`` does not code ``count`` such positions.
    """
    if not 0 <= count <= numel or data.numel() != packed_size(count, numel):
        raise MalformedError(f"{data.numel()} bytes cannot hold {count} positions below {numel}", count=count)
    if data.device.type != "cpu":
        return unpack_oracle(data, count, numel)
    from thinwire.compress import loops

    low, low_bytes, _ = _sizes(count, numel)
    positions = torch.empty(count, dtype=torch.int32)
    padded = torch.zeros(data.numel() + 16, dtype=torch.uint8)
    padded[: data.numel()] = data
    cells = padded.numpy()
    if low:
        good = loops.unpack(cells, cells[low_bytes:], low, numel, positions.numpy())
    else:
        good = loops.unpack_bitmap(cells, numel, positions.numpy())
    if not good:
        raise MalformedError(f"the bytes are not those of {count} increasing positions below {numel}", count=count)
    return positions


# --- the readable versions, which also serve on GPUs ---------------------------------------------------------------


def _pack_bits(bits: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def _unpack_bits(data: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data.unsqueeze(1) >> places) & 1).view(-1)


def pack_oracle(positions: Tensor, numel: int) -> Tensor:
    """:func:`pack`, said in torch operations."""
    count = positions.numel()
    low, _, high_bytes = _sizes(count, numel)
    if count == 0:
        return torch.empty(0, dtype=torch.uint8, device=positions.device)
    wide = positions.long()
    bitmap = torch.zeros(high_bytes * 8, dtype=torch.uint8, device=positions.device)
    if not low:
        bitmap[wide] = 1
        return _pack_bits(bitmap)
    bitmap[(wide >> low) + torch.arange(count, device=positions.device)] = 1
    low_bits = (wide.unsqueeze(1) >> torch.arange(low, device=positions.device)) & 1
    return torch.cat([_pack_bits(low_bits.view(-1)), _pack_bits(bitmap)])


def unpack_oracle(data: Tensor, count: int, numel: int) -> Tensor:
    """:func:`unpack`, said in torch operations."""
    low, low_bytes, _ = _sizes(count, numel)
    bits = _unpack_bits(data[low_bytes:]).nonzero().view(-1)
    if bits.numel() != count:
        raise MalformedError(f"{bits.numel()} positions where {count} are due", expected=count)
    if low:
        high = bits - torch.arange(count, device=data.device)
        places = torch.arange(low, device=data.device)
        lows = (_unpack_bits(data[:low_bytes])[: count * low].view(count, low).long() << places).sum(1)
        bits = (high << low) | lows
    if count and (int(bits[-1]) >= numel or bool((bits[1:] <= bits[:-1]).any())):
        raise MalformedError(f"the bytes are not those of {count} increasing positions below {numel}", count=count)
    return bits.to(torch.int32)

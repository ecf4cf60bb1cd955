"""Where the tensors of a checkpoint lie in an inference engine's own: fused, sharded, padded, tied.

Engines such as vLLM and SGLang stack ``q_proj``, ``k_proj`` and ``v_proj`` into one ``qkv_proj``, pad embeddings and
keep a slice a rank. Their loaders know how. :func:`probe` asks the loader itself: it loads tensors whose values say
which tensor, row and column they are, and reads from the engine's memory what went where. That is done once; afterwards
a sparse patch of the checkpoint is written straight into the fused tensors.

>>> fused = torch.zeros(4, 2)
>>> def load(weights):  # an engine's load_weights: two tensors, stacked
...     for name, tensor in weights:
...         fused[slice(0, 3) if name == "q" else slice(3, 4)].copy_(tensor)
>>> layouts = {"q": Layout(dtype_of("F32"), (3, 2)), "k": Layout(dtype_of("F32"), (1, 2))}
>>> found = probe({"qk": fused}, load, layouts)
>>> [(piece.tensor, piece.rows, piece.columns) for piece in found.pieces["k"]]
[('qk', (3, 4), (0, 2))]
>>> found.scatter("k", np.array([1]), np.array([0x40400000], np.uint32))
>>> fused[3].tolist()
[0.0, 3.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from thinwire.errors import MisuseError
from thinwire.sync.layout import Layout
from thinwire.tensors.bits import torch_dtype
from thinwire.tensors.device import bits_of
from thinwire.wire.spec import dtype_of

__all__ = ["IndexMap", "Load", "Piece", "Write", "dtype_of", "probe"]

Cells = npt.NDArray[np.unsignedinteger]
Load = Callable[[Iterator[tuple[str, torch.Tensor]]], object]
"""An engine's loader: takes (name, tensor) pairs of a checkpoint and copies them into its own tensors."""

_CHUNK = 1 << 24  # elements looked at at once


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows and columns [start, stop) of the engine's ``tensor``, seen as a matrix: all but its last dimension are rows.

    ``row_of`` gives for each row of the checkpoint's tensor the row of the engine's that holds it, or -1, ``column_of``
    likewise; ``source_rows`` and ``source_columns`` are the other way round, for the piece alone.
    """

    tensor: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    source_rows: npt.NDArray[np.int64]
    source_columns: npt.NDArray[np.int64]
    row_of: npt.NDArray[np.int64] = field(repr=False)
    column_of: npt.NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Write:
    """Elements to be written to one of the engine's tensors, on its device."""

    bits: torch.Tensor
    where: torch.Tensor
    values: torch.Tensor

    @property
    def size(self) -> int:
        """How many."""
        return self.where.numel()

    def run(self) -> None:
        """Write them."""
        self.bits.index_copy_(0, self.where, self.values)


class IndexMap:
    """Where each tensor of a checkpoint lies. ``pieces`` by the checkpoint's names.

    ``unmapped``: tensors that the loader takes but does not merely copy, so that they must go through it. ``unused``:
    tensors that it leaves out (or that another rank holds).
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        layouts: Mapping[str, Layout],
        pieces: Mapping[str, tuple[Piece, ...]],
        unmapped: Iterable[str],
    ) -> None:
        self.tensors, self.layouts, self.pieces = dict(tensors), dict(layouts), dict(pieces)
        self.unmapped = frozenset(unmapped)
        self.unused = frozenset(layouts) - frozenset(pieces) - self.unmapped

    def without(self, names: Iterable[str]) -> IndexMap:
        """The same, with these tensors ``unmapped``."""
        gone = frozenset(names)
        pieces = {name: found for name, found in self.pieces.items() if name not in gone}
        return IndexMap(self.tensors, self.layouts, pieces, self.unmapped | gone)

    def plan(self, name: str, positions: npt.NDArray[np.int64], cells: Cells) -> list[Write]:
        """How to write ``cells`` at flat ``positions`` of the checkpoint's tensor ``name``, wherever these lie."""
        width = _matrix(self.layouts[name].shape)[1]
        found = []
        for piece in self.pieces.get(name, ()):
            tensor = self.tensors[piece.tensor]
            row, column = np.divmod(positions, width)
            row, column = piece.row_of[row], piece.column_of[column]
            here = (row >= 0) & (column >= 0)
            where = row * _matrix(tensor.shape)[1] + column
            values = cells
            if not here.all():
                where, values = where[here], cells[here]
            if where.size:
                places = torch.from_numpy(where).to(tensor.device)
                found.append(Write(bits_of(tensor), places, _signed(values).to(tensor.device)))
        return found

    def scatter(self, name: str, positions: npt.NDArray[np.int64], cells: Cells) -> None:
        """Write ``cells`` at flat ``positions`` of the checkpoint's tensor ``name``."""
        for write in self.plan(name, positions, cells):
            write.run()

    def write(self, name: str, cells: Cells) -> None:
        """Write all of the checkpoint's tensor ``name``."""
        for piece, part in self._parts(name, cells):
            self._region(piece).copy_(part)

    def agrees(self, name: str, cells: Cells) -> bool:
        """Whether every place that holds (a part of) the checkpoint's tensor ``name`` has just these bits."""
        return all(torch.equal(self._region(piece).cpu(), part) for piece, part in self._parts(name, cells))

    def _parts(self, name: str, cells: Cells) -> Iterator[tuple[Piece, torch.Tensor]]:
        whole = _signed(cells).reshape(_matrix(self.layouts[name].shape))
        for piece in self.pieces.get(name, ()):
            rows, columns = torch.from_numpy(piece.source_rows), torch.from_numpy(piece.source_columns)
            part = whole
            if rows.numel() != whole.shape[0] or not torch.equal(rows, torch.arange(whole.shape[0])):
                part = part[rows]
            if columns.numel() != whole.shape[1] or not torch.equal(columns, torch.arange(whole.shape[1])):
                part = part[:, columns]
            yield piece, part

    def _region(self, piece: Piece) -> torch.Tensor:
        tensor = self.tensors[piece.tensor]
        matrix = bits_of(tensor).view(_matrix(tensor.shape))
        return matrix[piece.rows[0] : piece.rows[1], piece.columns[0] : piece.columns[1]]


def _matrix(shape: Iterable[int]) -> tuple[int, int]:
    sizes = tuple(shape)
    return (math.prod(sizes), 1) if len(sizes) < 2 else (math.prod(sizes[:-1]), sizes[-1])


def _signed(cells: Cells) -> torch.Tensor:
    own = cells if cells.flags.writeable else cells.copy()
    return torch.from_numpy(own.view(f"i{own.itemsize}") if own.itemsize > 1 else own)


def _base(dtype: torch.dtype) -> int:
    """Integers below this are exact in ``dtype``; 0 where none are to be had."""
    if dtype is torch.bool or dtype.is_complex:
        return 0
    return 16 if dtype.itemsize == 1 else 256


def _digits(largest: int, base: int) -> int:
    found = 1
    while base and largest >= base**found:
        found += 1
    return found


@dataclass(slots=True)
class _Found:
    """A rectangle of an engine's tensor that holds a part of one of the checkpoint's, while it is being explored."""

    number: int  # of the checkpoint's tensor, from 1
    rows: tuple[int, int]
    columns: tuple[int, int]
    source_rows: npt.NDArray[np.int64]
    source_columns: npt.NDArray[np.int64]


class _Prober:
    """One exploration: passes of the loader, and what is read between them."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], load: Load, layouts: Mapping[str, Layout], aliases: Mapping[str, str]
    ) -> None:
        self.load, self.layouts = load, dict(layouts)
        self.names = ["", *layouts]  # 0 is what loaders fill padding with
        self.numbers = {name: number for number, name in enumerate(self.names) if number}
        self.known_as: dict[str, list[str]] = {name: [name] for name in layouts}
        for alias, name in aliases.items():
            self.known_as[name].append(alias)
        self.dtypes = {name: torch_dtype(layout.dtype.name) for name, layout in layouts.items()}
        self.tensors = _distinct(tensors)
        self.bad: set[str] = set()  # engine tensors that are no plain copies

    def run(self, digit: Callable[[str, int], torch.Tensor], base_power: int) -> None:
        """One pass: every tensor of the checkpoint holds the ``base_power``-th digit of what ``digit`` says."""
        for tensor in self.tensors.values():
            if _base(tensor.dtype):
                tensor.fill_(-1 if tensor.dtype.is_floating_point or tensor.dtype.is_signed else 255)

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            for name in self.layouts:
                dtype, shape = self.dtypes[name], self.layouts[name].shape
                base = _base(dtype)
                if not base:
                    continue
                marked = (digit(name, base) // base**base_power % base).to(dtype)
                marked = marked.expand(_matrix(shape)).contiguous().reshape(shape)
                for known in self.known_as[name]:
                    yield known, marked

        self.load(weights())

    def number(self) -> dict[str, list[_Found]]:
        """Which tensor lies where: rectangles by engine tensor."""
        sums: dict[str, tuple[str, npt.NDArray[np.int64]]] = {}
        passes = max((_digits(len(self.names), _base(t.dtype)) for t in self.tensors.values()), default=1)
        for power in range(passes):
            self.run(lambda name, _: torch.tensor(self.numbers[name]), power)
            for key, tensor in self.tensors.items():
                if key in self.bad:
                    continue
                read = _as_function(tensor)
                if read is None or (key in sums and sums[key][0] != read[0] and not _uniform(sums[key][1], read[1])):
                    self.bad.add(key)
                    continue
                sums[key] = _added(sums.get(key), read, _base(tensor.dtype), power, tensor.shape)
        found = {key: _segments(*sums[key], self.tensors[key].shape) for key in sums if key not in self.bad}
        self.run(lambda name, _: torch.tensor(_mixed(self.numbers[name])), 0)
        for key in [key for key, founds in found.items() if not all(self._confirms(key, one) for one in founds)]:
            self.bad.add(key)  # the loader computes: what looked like a number was another one, changed
            del found[key]
        return found

    def _confirms(self, key: str, found: _Found) -> bool:
        tensor = self.tensors[key]
        matrix = tensor.reshape(_matrix(tensor.shape))
        part = matrix[found.rows[0] : found.rows[1], found.columns[0] : found.columns[1]]
        expected = torch.tensor(_mixed(found.number) % _base(tensor.dtype), device=tensor.device).to(tensor.dtype)
        return _equals(part, expected.reshape(1, 1))

    def locate(self, found: dict[str, list[_Found]]) -> None:
        """Which row and column of its tensor each row and column of a rectangle holds."""
        for axis in (0, 1):
            known = [self.names[f.number] for fs in found.values() for f in fs if f.number < len(self.names)]
            sizes = [_matrix(self.layouts[name].shape)[axis] for name in known]
            smallest = min((_base(self.tensors[key].dtype) for key in found), default=256)
            for power in range(_digits(max(sizes, default=1) - 1, smallest)):
                self.run(lambda name, _, axis=axis: self._index(name, axis), power)  # type: ignore[misc]
                for key in [key for key in found if key not in self.bad]:
                    self._take(key, found[key], axis, power)

    def _index(self, name: str, axis: int) -> torch.Tensor:
        rows, columns = _matrix(self.layouts[name].shape)
        return torch.arange(rows)[:, None] if axis == 0 else torch.arange(columns)[None, :]

    def _take(self, key: str, founds: list[_Found], axis: int, power: int) -> None:
        tensor = self.tensors[key]
        base = _base(tensor.dtype)
        matrix = tensor.reshape(_matrix(tensor.shape))
        for found in founds:
            part = matrix[found.rows[0] : found.rows[1], found.columns[0] : found.columns[1]]
            line = part[:, :1] if axis == 0 else part[:1, :]
            if not _equals(part, line):
                self.bad.add(key)
                return
            values = line.reshape(-1).cpu().to(torch.float64).numpy()
            if not ((values >= 0) & (values < base) & (values == np.floor(values))).all():
                self.bad.add(key)
                return
            target = found.source_rows if axis == 0 else found.source_columns
            target += values.astype(np.int64) * base**power


def _distinct(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Engine tensors, tied ones once, without those that have no plain memory to write to."""
    seen: set[tuple[int, torch.dtype, tuple[int, ...]]] = set()
    found = {}
    for key, tensor in tensors.items():
        plain = tensor.detach()
        identity = (plain.data_ptr(), plain.dtype, tuple(plain.shape))
        if plain.numel() and plain.is_contiguous() and identity not in seen:
            seen.add(identity)
            found[key] = plain
    return found


def _equals(part: torch.Tensor, line: torch.Tensor) -> bool:
    step = max(_CHUNK // max(part.shape[1], 1), 1)
    for start in range(0, part.shape[0], step):
        block = part[start : start + step]
        other = line[start : start + step] if line.shape[0] == part.shape[0] and line.shape[1] == 1 else line
        if not bool((block == other).all()):
            return False
    return True


def _as_function(tensor: torch.Tensor) -> tuple[str, npt.NDArray[np.float64]] | None:
    """The tensor as a matrix whose entries depend on the row alone, or on the column alone; None if on both."""
    matrix = tensor.reshape(_matrix(tensor.shape))
    for kind, line in (("row", matrix[:, :1]), ("column", matrix[:1, :])):
        if _equals(matrix, line):
            return kind, line.reshape(-1).cpu().to(torch.float64).numpy()
    return None


def _mixed(number: int) -> int:
    """Another mark of the same tensor, which no simple function takes to that of the first one's image."""
    return number * 37 + 11


def _uniform(first: npt.NDArray[np.int64], second: npt.NDArray[np.float64]) -> bool:
    """Whether one of two functions is a constant, so that they can be added whatever they depend on."""
    return bool((first == first[:1]).all() or (second == second[:1]).all())


def _added(
    held: tuple[str, npt.NDArray[np.int64]] | None,
    read: tuple[str, npt.NDArray[np.float64]],
    base: int,
    power: int,
    shape: Iterable[int],
) -> tuple[str, npt.NDArray[np.int64]]:
    """Numbers so far plus the next digit; -1 stays where nothing was loaded or no digit is to be read."""
    kind, values = read
    scale = base**power
    digits = np.where((values >= 0) & (values < base) & (values == np.floor(values)), values, -1).astype(np.int64)
    if held is None:
        return kind, np.where(digits < 0, -1, digits * scale)
    if held[0] != kind:  # one of them is a constant
        sizes = dict(zip(("row", "column"), _matrix(shape), strict=True))
        if (digits == digits[:1]).all():
            kind, digits = held[0], np.full(sizes[held[0]], digits[0])
        else:
            held = kind, np.full(sizes[kind], held[1][0])
    return kind, np.where((digits < 0) | (held[1] < 0), -1, held[1] + digits * scale)


def _segments(kind: str, numbers: npt.NDArray[np.int64], shape: Iterable[int]) -> list[_Found]:
    rows, columns = _matrix(shape)
    ends = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), numbers.size]
    found = []
    for start, stop in pairwise(ends):
        if numbers[start] > 0:
            r, c = ((start, stop), (0, columns)) if kind == "row" else ((0, rows), (start, stop))
            zero_rows, zero_columns = np.zeros(r[1] - r[0], np.int64), np.zeros(c[1] - c[0], np.int64)
            found.append(_Found(int(numbers[start]), r, c, zero_rows, zero_columns))
    return found


def _piece(key: str, found: _Found, shape: Iterable[int]) -> Piece | None:
    """A finished piece; None if what was read is no part of the tensor, or not all of it distinct."""
    rows, columns = _matrix(shape)
    inverses = []
    for source, size, start in (
        (found.source_rows, rows, found.rows[0]),
        (found.source_columns, columns, found.columns[0]),
    ):
        if source.size and (source.max() >= size or np.unique(source).size != source.size):
            return None
        inverse = np.full(size, -1, np.int64)
        inverse[source] = start + np.arange(source.size)
        inverses.append(inverse)
    return Piece(key, found.rows, found.columns, found.source_rows, found.source_columns, inverses[0], inverses[1])


def probe(
    tensors: Mapping[str, torch.Tensor],
    load: Load,
    layouts: Mapping[str, Layout],
    aliases: Mapping[str, str] | None = None,
) -> IndexMap:
    """Find out where ``load`` puts a checkpoint of these ``layouts`` in the engine's ``tensors`` (name to tensor).

    The loader is called some six times, with marked tensors under all their names; afterwards ``tensors`` hold again
    what they held, from a copy on the host. Everything is checked element by element: a tensor that arrives converted,
    permuted over both dimensions or computed from several is ``unmapped``.

    Raises:
        MisuseError: the loader fails, or takes nothing at all.
    """
    prober = _Prober(tensors, load, layouts, aliases or {})
    with torch.no_grad():
        held = {key: tensor.to("cpu", copy=True) for key, tensor in prober.tensors.items()}
        try:
            found = prober.number()
            prober.locate(found)
        except MisuseError:
            raise
        except Exception as error:
            raise MisuseError(
                f"the engine's loader fails on a checkpoint of these tensors: {type(error).__name__}: {error}"
            ) from error
        finally:
            for key, tensor in prober.tensors.items():
                tensor.copy_(held.pop(key))
    pieces: dict[str, list[Piece]] = {}
    touched = {f.number for fs in found.values() for f in fs}
    spoilt = {prober.names[f.number] for key in prober.bad for f in found.get(key, ()) if f.number < len(prober.names)}
    for key, founds in found.items():
        for one in founds if key not in prober.bad else ():
            name = prober.names[one.number] if one.number < len(prober.names) else prober.names[0]
            layout = layouts.get(name)
            piece = None if layout is None else _piece(key, one, layout.shape)
            if piece is None or prober.dtypes[name] != prober.tensors[key].dtype:
                spoilt.add(name)
            else:
                pieces.setdefault(name, []).append(piece)
    if not touched and not prober.bad:
        raise MisuseError("the engine's loader takes none of these tensors; is this a checkpoint of another model?")
    unmapped = spoilt & set(layouts)
    if prober.bad - set(found):  # nobody can say which tensors went there, so none of those without a place is safe
        unmapped |= set(layouts) - set(pieces)
    good = {name: tuple(ps) for name, ps in pieces.items() if name not in unmapped}
    return IndexMap(prober.tensors, layouts, good, unmapped)

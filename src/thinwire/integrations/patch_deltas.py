"""Reading patches as sparse deltas, tensor by tensor: the way from the chain's files to merging and to task switching.

>>> from thinwire.sync.encode import make_patch, take_snapshot
>>> from thinwire.sync.layout import StateSource
>>> from thinwire.tensors.tree import state_of
>>> base = {"w": torch.zeros(8, dtype=torch.bfloat16)}
>>> source = source_of_state(base)
>>> tuned = {"w": torch.tensor([0, 0, 1.5, 0, 0, 0, 0, 2], dtype=torch.bfloat16)}
>>> patch = make_patch(take_snapshot(StateSource(state_of(base))), StateSource(state_of(tuned)))
>>> reader = PatchReader(patch, source)
>>> reader.changed, reader.delta("w").positions.tolist()
(['w'], [2, 7])
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from thinwire.errors import MalformedError, MisuseError, WrongBaseError
from thinwire.merge.blocks import gather_at
from thinwire.merge.delta import TensorDelta, delta_of_cells
from thinwire.sync.apply import check_fits
from thinwire.sync.layout import Layout, MemorySource
from thinwire.tensors.bits import cells_of, dtype_of_tensor, shape_of
from thinwire.tensors.tree import state_of
from thinwire.wire.patch import Patch, Row
from thinwire.wire.segment import Changes, decode_segment
from thinwire.wire.spec import dtype_of
from thinwire.wire.values import apply_steps

__all__ = ["PatchReader", "check_parent", "read_deltas", "source_of_state"]

Cells = npt.NDArray[np.unsignedinteger]


def source_of_state(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> MemorySource:
    """A model's tensors as cells: views where they lie on the host, contiguous; copies elsewhere."""
    state = state_of(model)
    layouts = {n: Layout(dtype_of_tensor(t), shape_of(t)) for n, t in state.tensors.items()}
    return MemorySource(layouts, {n: cells_of(t) for n, t in state.tensors.items()}, state.aliases)


def check_parent(patch: Patch, digest: str, name: str = "the patch") -> None:
    """Whether ``patch`` starts from the state with this digest.

    Raises:
        WrongBaseError: it does not; both digests are named.
    """
    if patch.parent != digest:
        raise WrongBaseError(
            f"{name} starts from {patch.parent}, the base is {digest}; merge only what was tuned from one base, or "
            "make the patch again from this base (thinwire diff)",
            expected=patch.parent,
            actual=digest,
        )


class PatchReader:
    """Gives the delta of any tensor of ``patch``, decoding only the segments that it lies in.

    ``base`` holds the cells of the patch's parent and must stay as it is; whether it *is* the parent is the caller's
    to check (:func:`check_parent`). Memory: ``segments_kept`` decoded segments of 2^20 changes, rarely up to 2^22. Two
    will do where tensors are read in their order (one is left behind, one begun), and one more for each thread that
    reads elsewhere. Threads may share a reader.

    Raises:
        WrongBaseError: the base has other tensors than the patch's parent.
        MisuseError: the patch adds, removes, renames or reshapes tensors: then it has no sparse delta.
    """

    def __init__(self, patch: Patch, base: MemorySource, *, segments_kept: int = 2) -> None:
        for row in patch.rows:
            if row.kind != "sparse":
                raise MisuseError(
                    f"the patch {'renames' if row.kind == 'moved' else 'brings a new'} tensor {row.name!r} "
                    f"({row.dtype} {row.shape}); only changes of the base's own tensors can be merged or switched",
                    tensor=row.name,
                )
        if patch.removed:
            raise MisuseError(f"the patch removes {patch.removed[0]!r}; only changed tensors can be merged or switched")
        check_fits(patch, base.layouts)
        self.patch, self.base, self._segments_kept = patch, base, segments_kept
        self._rows: dict[str, tuple[Row, int]] = {}  # with its first cell among all of its data type
        self._members: dict[str, list[tuple[int, Row]]] = {}
        for row in patch.rows:
            members = self._members.setdefault(row.dtype, [])
            start = members[-1][0] + members[-1][1].cells if members else 0
            members.append((start, row))
            self._rows[row.name] = (row, start)
        self._segments: dict[str, list[int]] = {}
        for i, segment in enumerate(patch.segment_rows):
            self._segments.setdefault(segment.dtype, []).append(i)
        self._starts = {
            kind: [0, *accumulate(patch.segment_rows[i].cells for i in found)] for kind, found in self._segments.items()
        }
        self._kept: OrderedDict[int, Changes | Cells] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in their order in the file; patches of one base have the same."""
        return [row.name for members in self._members.values() for _, row in members]

    @property
    def changed(self) -> list[str]:
        """Names of the tensors with changes, in their order in the file: reading them so decodes each segment once."""
        return [name for name in self.names if self._rows[name][0].changed]

    def delta(self, name: str) -> TensorDelta:
        """The delta of one tensor; empty if it has no changes.

        Raises:
            MisuseError: there is no such tensor.
            MalformedError, UnsupportedError: the patch is damaged, or not of this base.
        """
        if name not in self._rows:
            raise MisuseError(f"the patch knows no tensor {name!r}", tensor=name)
        row, start = self._rows[name]
        dtype, stop = dtype_of(row.dtype), start + row.cells
        kind = np.int32 if row.cells < 1 << 31 else np.int64
        positions: list[npt.NDArray[Any]] = []
        olds: list[Cells] = []
        news: list[Cells] = []
        old = self.base.cells[name]
        starts = self._starts.get(row.dtype, [0])
        k = bisect_right(starts, start) - 1
        while row.changed and k < len(starts) - 1 and starts[k] < stop:
            changes = self._decoded(self._segments[row.dtype][k])
            first, last = max(start, starts[k]), min(stop, starts[k + 1])  # of this tensor in this segment
            found, new = _cut(changes, first - starts[k], last - starts[k], old[first - start : last - start])
            shift = first - start if not isinstance(changes, Changes) else starts[k] - start
            where, before = np.empty(found.size, kind), np.empty(found.size, dtype.cells)
            gather_at(found, shift, old, where, before)
            positions.append(where)
            olds.append(before)
            news.append(self._values(new, before, row.dtype) if isinstance(changes, Changes) else new)
            k += 1
        delta = delta_of_cells(
            row.dtype, row.shape, _joined(positions, kind), _joined(olds, dtype.cells), _joined(news, dtype.cells)
        )
        if delta.changed != row.changed:
            raise MalformedError(f"the table gives {name!r} {row.changed} changes, the segments {delta.changed}")
        return delta

    def _values(self, codes: Cells, old: Cells, dtype: str) -> Cells:
        if self.patch.values == "absolute":
            return codes
        return apply_steps(old, codes, is_float=dtype_of(dtype).is_float)

    def _decoded(self, index: int) -> Changes | Cells:
        with self._lock:
            if index not in self._kept:
                row = self.patch.segment_rows[index]
                changes: Changes | Cells = Changes(np.empty(0, np.uint32), np.empty(0, dtype_of(row.dtype).cells))
                if row.changed:
                    changes = decode_segment(
                        memoryview(self.patch.segments[index]),
                        dtype_of(row.dtype),
                        cells=row.cells,
                        changed=row.changed,
                        values=self.patch.values,
                        base=self._base_of(index),
                    )
                self._kept[index] = changes
                while len(self._kept) > self._segments_kept:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(index)
            return self._kept[index]

    def _base_of(self, index: int) -> list[Cells]:
        kind = self.patch.segment_rows[index].dtype
        at = self._segments[kind].index(index)
        first, last = self._starts[kind][at], self._starts[kind][at + 1]
        pieces = []
        for start, row in self._members[kind]:
            if start < last and first < start + row.cells:
                pieces.append(self.base.cells[row.name][max(first - start, 0) : last - start])
        return pieces


def _joined(parts: list[npt.NDArray[Any]], kind: Any) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, kind), *parts])


def _cut(changes: Changes | Cells, first: int, last: int, old: Cells) -> tuple[npt.NDArray[Any], Cells]:
    """What lies in cells ``first`` to ``last`` of a segment: positions in it with codes, or, of a segment without
    positions, positions from ``first`` on with new cells."""
    if isinstance(changes, Changes):
        ends = np.searchsorted(changes.positions, np.array([first, last], np.uint32))
        return changes.positions[ends[0] : ends[1]], changes.codes[ends[0] : ends[1]]
    part = changes[first:last]
    found = np.flatnonzero(part != old)
    return found, part[found]


def read_deltas(patch: Patch, base: MemorySource) -> Iterator[tuple[str, TensorDelta]]:
    """The deltas of all changed tensors, one after another: names and deltas, in the order of the file.

    Raises: as :class:`PatchReader` and its ``delta`` do.
    """
    reader = PatchReader(patch, base)
    for name in reader.changed:
        yield name, reader.delta(name)

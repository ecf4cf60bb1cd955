"""A snapshot over cells that are not ours to move on: what is read of it is lent as copies."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from thinwire.sync.encode import Snapshot
from thinwire.sync.layout import MemorySource
from thinwire.wire.digests import Tree

__all__ = ["LendingSnapshot"]

Cells = npt.NDArray[np.unsignedinteger]


class LendingSnapshot(Snapshot):
    """For one patch from a mapped file: :func:`~thinwire.sync.encode.make_patch` moves the base on in place, which
    would turn all of a private map into memory of this process. It gets copies of blocks instead, the same one as long
    as it works on a stripe; :meth:`give_back`, called by the thread that has finished one (as its progress does), frees
    them.

    A subclass, against the rule of the house, because make_patch asks for this class.
    """

    def __init__(self, source: MemorySource, leaves: dict[str, list[bytes]], tree: Tree) -> None:
        super().__init__(dict(source.layouts), dict(source.cells), leaves, tree)
        self._lent = threading.local()

    def read(self, name: str, start: int, stop: int) -> Cells:
        blocks = self._blocks()
        key = (name, start, stop)
        if key not in blocks:
            blocks[key] = self.cells[name][start:stop].copy()
        return blocks[key]

    def give_back(self) -> None:
        """Free this thread's copies."""
        self._blocks().clear()

    def _blocks(self) -> dict[tuple[str, int, int], Cells]:
        """Those lent to this thread."""
        if not hasattr(self._lent, "blocks"):
            self._lent.blocks = {}
        blocks: dict[tuple[str, int, int], Cells] = self._lent.blocks
        return blocks

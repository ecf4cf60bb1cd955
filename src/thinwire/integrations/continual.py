"""Patches that come one after another, kept apart: how much of each is still there, and how to take any of them back.

The weights are the base with every patch's cells on it, later patches over earlier ones. Since each patch's cells are
kept, taking one out of the middle leaves exactly what the others would have made without it; no arithmetic is undone.

>>> import torch
>>> from thinwire.sync.encode import make_patch, take_snapshot
>>> from thinwire.sync.layout import StateSource
>>> from thinwire.tensors.tree import state_of
>>> def patch(old, new):
...     old, new = ({"w": torch.tensor(values)} for values in (old, new))
...     return make_patch(take_snapshot(StateSource(state_of(old))), StateSource(state_of(new)))
>>> model = {"w": torch.tensor([0.0, 0.0, 0.0])}
>>> history = Continual(model)
>>> _ = history.add(patch([0.0, 0.0, 0.0], [1.0, 1.0, 0.0]), "first")
>>> _ = history.add(patch([1.0, 1.0, 0.0], [1.0, 2.0, 2.0]), "second")  # made from what the first had led to
>>> [(one.name, one.changed, one.kept) for one in history.report().patches]
[('first', 2, 1), ('second', 2, 2)]
>>> history.undo("first")
>>> model["w"].tolist()
[0.0, 2.0, 2.0]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thinwire.errors import MisuseError, WrongBaseError
from thinwire.integrations.overlay import Model, Names, Overlay
from thinwire.merge.delta import MERGEABLE, TensorDelta, delta_of_cells
from thinwire.sync.encode import Options, make_patch, take_snapshot
from thinwire.wire.patch import Patch

__all__ = ["COMPACTED", "Continual", "PatchReport", "Report", "backward_transfer", "forgetting"]

COMPACTED = "compacted"
"""The name of what the patches have become that can no longer be taken back."""

Scores = Mapping[str, float]
Deltas = Mapping[str, TensorDelta]


def forgetting(scores: Sequence[Scores]) -> dict[str, float]:
    """How far each task has fallen from its best earlier score: Chaudhry et al. 2018 (arXiv:1801.10112), section 4.

    ``scores`` holds the scores measured after each patch, higher being better; tasks measured only once are left out.

    >>> forgetting([{"math": 0.75}, {"math": 0.5, "code": 0.9}])
    {'math': 0.25}
    """
    found = {}
    for task in sorted({name for row in scores for name in row}):
        seen = [row[task] for row in scores if task in row]
        if len(seen) > 1:
            found[task] = max(seen[:-1]) - seen[-1]
    return found


def backward_transfer(names: Sequence[str], scores: Sequence[Scores]) -> float | None:
    """Mean of (score now - score just after its own patch): Lopez-Paz and Ranzato 2017 (arXiv:1706.08840), eq. 3.

    Over the tasks that are called as a patch is, but the last; None if nothing was measured twice.

    >>> backward_transfer(["math", "code"], [{"math": 0.75}, {"math": 0.5, "code": 0.9}])
    -0.25
    """
    changes = [
        scores[-1][name] - scores[i][name]
        for i, name in enumerate(names[:-1])
        if scores[i] and name in scores[i] and name in scores[-1]
    ]
    return sum(changes) / len(changes) if changes else None


@dataclass(frozen=True, slots=True)
class PatchReport:
    """One patch: cells it changes, how many of them no later patch has overwritten, bytes, whether it can be undone."""

    name: str
    changed: int
    kept: int
    size: int
    undoable: bool

    @property
    def overwritten(self) -> float:
        """Share of its cells that later patches have overwritten, from 0 to 1."""
        return 1 - self.kept / self.changed if self.changed else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """The patches in their order, and how they meet.

    ``shared`` [n, n] counts the cells that both of two patches change; ``conflicts`` [n, n] those of them which they
    move away from the base in opposite directions. ``changed`` counts the cells that any patch changes.
    ``forgetting`` and ``backward_transfer`` come from the scores that were given to :meth:`Continual.add`.
    """

    patches: tuple[PatchReport, ...]
    shared: npt.NDArray[np.int64]
    conflicts: npt.NDArray[np.int64]
    changed: int
    forgetting: Mapping[str, float]
    backward_transfer: float | None

    def jaccard(self) -> npt.NDArray[np.float64]:
        """Shared cells by cells that either of two patches changes [n, n], from 0 to 1."""
        own = np.diagonal(self.shared)
        either = own[:, None] + own[None, :] - self.shared
        share: npt.NDArray[np.float64] = self.shared / np.maximum(either, 1)
        return share


def _folded(layers: Sequence[Deltas], *, drop_equal: bool) -> dict[str, TensorDelta]:
    """Layers as one, later ones over earlier ones; ``drop_equal`` leaves out what comes to the base's cell again."""
    found = {}
    for name in sorted({name for layer in layers for name in layer}):
        parts = [layer[name] for layer in reversed(layers) if name in layer]
        where, first = np.unique(np.concatenate([d.positions for d in parts]), return_index=True)
        base, new = (np.concatenate([getattr(d, side) for d in parts])[first] for side in ("base", "new"))
        d = parts[0]
        whole = TensorDelta(d.dtype, d.shape, where, base, new)
        found[name] = delta_of_cells(d.dtype, d.shape, where, base, new) if drop_equal else whole
    return {name: delta for name, delta in found.items() if delta.changed}


def _meet(a: TensorDelta, b: TensorDelta) -> tuple[int, int]:
    """Shared positions of two patches, and those of opposite directions."""
    where, left, right = np.intersect1d(a.positions, b.positions, assume_unique=True, return_indices=True)
    if a.dtype not in MERGEABLE:
        return where.size, 0
    with np.errstate(invalid="ignore"):
        signs = np.sign(a.differences()[left]) * np.sign(b.differences()[right])
    return where.size, int((signs < 0).sum())


class Continual:
    """A model to which patches are added over time, in place.

    Args:
        base: the model (or state dict) at its first state; it is changed in place.
        undo_last: how many patches can be taken back; older ones are folded into one. None: all.
        compact_every: how many patches beyond ``undo_last`` may gather before they are folded.
        names: maps the tensors' names in the patches to those in the model.

    Memory: for each cell of each patch a position, the base's cell and its own.

    >>> import torch
    >>> history = Continual(torch.nn.Linear(2, 2), undo_last=4)
    >>> history.names
    []
    """

    def __init__(
        self, base: Model, *, undo_last: int | None = None, compact_every: int = 8, names: Names | None = None
    ) -> None:
        if compact_every < 1 or (undo_last is not None and undo_last < 0):
            raise MisuseError("compact_every must be positive and undo_last not negative")
        self.undo_last, self.compact_every = undo_last, compact_every
        self._overlay = Overlay(base, names)
        self._scores: dict[str, Scores] = {}
        self._added = 0

    @property
    def names(self) -> list[str]:
        """The patches in their order; the first is :data:`COMPACTED` once some were folded."""
        return list(self._overlay.stack)

    def digest(self, hash_name: str = "blake3") -> str:
        """Digest of the model as it is now, hashed from its memory.

        Raises:
            MisuseError: nothing has been added yet.
        """
        return self._overlay.tree(hash_name).digest

    def add(self, patch: Patch, name: str | None = None, *, scores: Scores | None = None) -> str:
        """Put a patch on top: one made from the base, or one made from the state as it is now. Returns its name.

        A patch from the base keeps its own values where earlier ones changed the same cells. ``scores`` are what an
        evaluation of the new state gave, by task, higher being better.

        Raises:
            WrongBaseError: the patch starts from neither; all digests are named. Nothing was changed.
            MisuseError: the name is taken; the patch adds, removes or reshapes tensors.
            MalformedError, UnsupportedError: the patch is damaged.
        """
        overlay = self._overlay
        name = name if name is not None else f"patch-{self._added + 1}"
        if name in overlay.tasks or name == COMPACTED:
            raise MisuseError(f"there is a patch {name!r} already", patch=name)
        stack = overlay.stack
        base = overlay.base_tree(patch.hash).digest if overlay.tasks else None
        try:
            if base == patch.parent:
                overlay.switch(())
            task = overlay.read(patch)
        except WrongBaseError as error:
            raise WrongBaseError(f"{error}; the base of all {len(stack)} patches is {base}", **error.facts) from error
        finally:
            overlay.switch(stack)
        overlay.tasks[name] = task
        overlay.switch((*stack, name))
        self._scores[name] = dict(scores or {})
        self._added += 1
        if self.undo_last is not None and len(self._own()) >= self.undo_last + self.compact_every:
            self.compact(self.undo_last)
        return name

    def _own(self) -> list[str]:
        return [name for name in self._overlay.stack if name != COMPACTED]

    def undo(self, name: str) -> None:
        """Take one patch out, wherever it is: the model is then what the others make without it, bit for bit.

        Raises:
            MisuseError: there is no such patch, or it was folded.
        """
        overlay = self._overlay
        if name not in self._own():
            raise MisuseError(f"{name!r} cannot be undone; these can: {self._own()[-10:]}", patch=name)
        overlay.switch(tuple(n for n in overlay.stack if n != name))
        del overlay.tasks[name], self._scores[name]

    def compact(self, keep_last: int = 0) -> None:
        """Fold all patches but the last ``keep_last`` into one. The weights stay as they are; memory is freed.

        Raises:
            MisuseError: ``keep_last`` is negative.
        """
        if keep_last < 0:
            raise MisuseError("keep_last must not be negative")
        overlay, stack = self._overlay, self._overlay.stack
        old = stack[: max(len(stack) - keep_last, 0)]
        if not old or old == (COMPACTED,):
            return
        whole = overlay.prepared(_folded([overlay.tasks[name].deltas for name in old], drop_equal=True))
        later = stack[len(old) :]
        overlay.switch(())  # so that no name stands for other cells than those that are on the model
        for name in old:
            del overlay.tasks[name]
            self._scores.pop(name, None)
        overlay.tasks[COMPACTED] = whole
        overlay.switch((COMPACTED, *later))

    # --- looking -----------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """How much of each patch is left, where patches meet, and what the scores say."""
        names, tasks = self.names, self._overlay.tasks
        layers = [tasks[name].deltas for name in names]
        shared, conflicts = np.zeros((len(names),) * 2, np.int64), np.zeros((len(names),) * 2, np.int64)
        for i, mine in enumerate(layers):
            for j in range(i + 1):
                pairs = [_meet(mine[name], layers[j][name]) for name in mine if name in layers[j]]
                shared[i, j] = shared[j, i] = sum(both for both, _ in pairs)
                conflicts[i, j] = conflicts[j, i] = 0 if i == j else sum(opposite for _, opposite in pairs)
        patches, above = [], dict[str, TensorDelta]()
        for name, layer in zip(reversed(names), reversed(layers), strict=True):
            covered = sum(_meet(layer[n], above[n])[0] for n in layer if n in above)
            changed = tasks[name].changed
            patches.append(PatchReport(name, changed, changed - covered, tasks[name].size, name != COMPACTED))
            above = _folded([layer, above], drop_equal=False)
        scores = [self._scores.get(name, {}) for name in names]
        return Report(
            patches=tuple(reversed(patches)),
            shared=shared,
            conflicts=conflicts,
            changed=sum(delta.changed for delta in above.values()),
            forgetting=forgetting(scores),
            backward_transfer=backward_transfer(names, scores),
        )

    def patch(self, options: Options | None = None) -> Patch:
        """One patch from the base to the state as it is now. Memory: a copy of the model; the base is on it meanwhile.

        Raises:
            MisuseError: nothing has been added yet.
        """
        overlay, stack = self._overlay, self._overlay.stack
        overlay.switch(())
        try:
            snapshot = take_snapshot(overlay.source())
        finally:
            overlay.switch(stack)
        return make_patch(snapshot, overlay.source(), options or Options())

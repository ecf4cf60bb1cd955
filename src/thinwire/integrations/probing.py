"""What changed between two checkpoints, tensor by tensor: the instruments on files, mapped and never whole in memory.

>>> import tempfile, pathlib
>>> from safetensors.torch import save_file
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> save_file({"mlp.up_proj.weight": torch.zeros(4, 4)}, folder / "a.safetensors")
>>> save_file({"mlp.up_proj.weight": torch.eye(4)}, folder / "b.safetensors")
>>> found = checkpoint_changes(folder / "a.safetensors", folder / "b.safetensors")
>>> [(one.name, one.place.kind, one.changes.density) for one in found.tensors]
[('mlp.up_proj.weight', 'mlp', 0.25)]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from thinwire.errors import MisuseError
from thinwire.probe.changes import NO_LIMITS, Changes, Limits, compare
from thinwire.probe.kinds import KINDS, Place, place_of
from thinwire.sync.checkpoint import open_checkpoint, tensors_of

__all__ = ["CheckpointChanges", "TensorChanges", "checkpoint_changes", "pairs_of", "sums_by"]


@dataclass(frozen=True, slots=True)
class TensorChanges:
    """A tensor that both checkpoints have, its shape, what it is for, and what changed in it."""

    name: str
    shape: tuple[int, ...]
    place: Place
    changes: Changes


@dataclass(frozen=True, slots=True)
class CheckpointChanges:
    """Every tensor of both checkpoints, and the names of those that only one has or that differ in shape or type."""

    tensors: tuple[TensorChanges, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    reshaped: tuple[str, ...]

    @property
    def total(self) -> Changes:
        """All tensors together."""
        return sum((one.changes for one in self.tensors), Changes())

    def by_kind(self) -> dict[str, Changes]:
        """What changed by kind of tensor, in the order of a model."""
        found = sums_by(self.tensors, lambda one: one.place.kind)
        return {kind: found[kind] for kind in KINDS if kind in found}

    def by_layer(self) -> dict[str, Changes]:
        """What changed by layer, first to last; ``outside`` are the tensors of none."""
        found = sums_by(self.tensors, lambda one: one.place.layer)
        return {".".join(map(str, layer)) or "outside": found[layer] for layer in sorted(found)}


Key = TypeVar("Key")


def sums_by(tensors: Iterable[TensorChanges], key: Callable[[TensorChanges], Key]) -> dict[Key, Changes]:
    """The changes of the tensors of each group."""
    found: dict[Key, Changes] = {}
    for one in tensors:
        found[key(one)] = found.get(key(one), Changes()) + one.changes
    return found


Path = str | os.PathLike[str]


def pairs_of(old: Path, new: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The tensors of one shape and data type that two checkpoints have, by name: old and new, mapped from their files.

    Raises:
        MisuseError: they have none in common.
        MalformedError: a file is damaged.
    """
    before, after = tensors_of(open_checkpoint(old).map()), tensors_of(open_checkpoint(new).map())
    both = [n for n in after if n in before and _alike(before[n], after[n])]
    if not both:
        raise MisuseError(f"{old} and {new} have no tensor in common; are they checkpoints of one model?")
    for name in both:
        yield name, before[name], after[name]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _layouts(path: Path) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    return {name: (entry.dtype, entry.shape) for name, entry in open_checkpoint(path).tensors.items()}


def checkpoint_changes(
    old: Path,
    new: Path,
    limits: Limits = NO_LIMITS,
    *,
    view: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointChanges:
    """Compare two checkpoints on their bits, floats as their ``view`` (fp32 masters as the bf16 that is served, say).

    ``progress(done, all)`` is told of bytes.

    Raises: as :func:`pairs_of`.
    """
    before, after = _layouts(old), _layouts(new)
    found, done = [], 0
    whole = sum(entry.stop - entry.start for entry in open_checkpoint(new).tensors.values())
    for name, was, now in pairs_of(old, new):
        size = now.nbytes
        if view is not None and now.is_floating_point():
            was, now = was.to(view), now.to(view)
        found.append(TensorChanges(name, tuple(now.shape), place_of(name), compare(was, now, limits)))
        done += size
        if progress is not None:
            progress(done, whole)
    names = {one.name for one in found}
    return CheckpointChanges(
        tuple(found),
        tuple(sorted(set(after) - set(before))),
        tuple(sorted(set(before) - set(after))),
        tuple(sorted(name for name in set(before) & set(after) if name not in names)),
    )

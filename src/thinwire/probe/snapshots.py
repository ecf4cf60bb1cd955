"""What is kept of a tensor to tell later what changed: all its cells, or one byte each.

*Exact* keeps the cells, in the data type as which the tensor is viewed. *Fast* keeps one byte an element:

=====================  ============================================================================  ===================
cells                  byte kept                                                                     overlooks
=====================  ============================================================================  ===================
8 bits                 the cell                                                                      nothing
16 bits                the low byte of the integer in numeric order                                  steps of 256 ULP,
                                                                                                     512 ULP, ...
32 and 64 bits         the low byte of a hash                                                        1 change in 256
=====================  ============================================================================  ===================

A fast snapshot of 16-bit floats knows the ULP distance of a step below 128 ULP exactly; longer ones are taken modulo
256, so weights near 0, whose ULP is tiny, fill bins where they do not belong. What a hash overlooks is added as an
expectation (``Changes.missed``). Differences are unknown to fast snapshots.

>>> weights = torch.ones(4, dtype=torch.bfloat16)
>>> kept = FastSnapshot(weights, None)
>>> weights[1] += 0.01
>>> kept.renew(weights).ulps, kept.renew(weights).changed
((0, 1), 0)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import nan
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.probe.change_kernels import BINS, follow_bytes
from thinwire.probe.change_torch import follow_on_device
from thinwire.probe.changes import BLOCK, NO_LIMITS, NO_WORDS, Changes, Limits, Words, compare_blocks, plain_tensor
from thinwire.tensors.bits import cells_of, dtype_of_tensor, is_host_view
from thinwire.wire.digests import hasher

__all__ = ["ExactSnapshot", "FastSnapshot", "Snapshot", "viewed_dtype"]

_HASHED_MISSES = 1 / 255
"""Expected changes overlooked for each that a hash of 8 bits shows."""


def viewed_dtype(tensor: Tensor, view: torch.dtype | None) -> torch.dtype:
    """The data type as which a tensor is measured: ``view`` for floating-point numbers of 16 bits and more."""
    wide = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return view if view is not None and wide else tensor.dtype


class Snapshot(ABC):
    """What is kept of one tensor. ``shape`` and ``dtype`` are those of the tensor, not of what is kept.

    ``kept`` [n] is 1-d and on the tensor's device.
    """

    def __init__(self, tensor: Tensor, view: torch.dtype | None) -> None:
        plain = plain_tensor(tensor)
        self.shape, self.dtype, self.view = tuple(plain.shape), plain.dtype, viewed_dtype(plain, view)
        self.kept = self._keep(plain.reshape(-1))

    @abstractmethod
    def _keep(self, flat: Tensor) -> Tensor:
        """What is to be kept of a tensor seen for the first time."""

    @abstractmethod
    def _compare_part(self, part: slice, new: Tensor, limits: Limits, renew: bool, words: Words) -> Changes:
        """What changed between the kept ``part`` and ``new``, which is that part in the view's data type."""

    def fits(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is of the shape and data type that was kept, on whatever device."""
        plain = plain_tensor(tensor)
        return (tuple(plain.shape), plain.dtype) == (self.shape, self.dtype)

    def compare(self, tensor: Tensor, limits: Limits, *, renew: bool, words: Words = NO_WORDS) -> Changes:
        """What changed since; with ``renew``, ``tensor`` is kept from now on.

        Raises:
            MisuseError: not the shape or data type that was kept.
        """
        plain = plain_tensor(tensor)
        if (tuple(plain.shape), plain.dtype) != (self.shape, self.dtype):
            raise MisuseError(f"kept was {self.dtype} {self.shape}, not {plain.dtype} {tuple(plain.shape)}")
        flat = plain.reshape(-1)
        if self.kept.device != flat.device:
            self.kept = self.kept.to(flat.device)
        step = max(1, flat.numel()) if plain.dtype == self.view else BLOCK if is_host_view(plain) else 1 << 22
        found = Changes()
        for start in range(0, max(1, flat.numel()), step):
            part = slice(start, min(start + step, flat.numel()))
            marks = words[start // 64 : -(-part.stop // 64)] if words.size else words
            found += self._compare_part(part, flat[part].to(self.view), limits, renew, marks)
        return found

    def renew(self, tensor: Tensor, limits: Limits = NO_LIMITS) -> Changes:
        """:meth:`compare`, and keep ``tensor``."""
        return self.compare(tensor, limits, renew=True)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self.kept.numel() * self.kept.element_size()

    def digest(self) -> str:
        """BLAKE3 of the bytes kept, hexadecimal."""
        return hasher("blake3")(cells_of(self.kept).view(np.uint8)).digest().hex()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes, for ``torch.save``."""
        about = (str(self.dtype), str(self.view), list(self.shape))
        return {"kept": self.kept.clone(), "about": about, "digest": self.digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what another snapshot of an equal tensor kept.

        Raises:
            MisuseError: of another shape, data type or view, or its bytes are not what they were.
        """
        kept, about = state["kept"], (str(self.dtype), str(self.view), list(self.shape))
        same = (kept.dtype, kept.shape) == (self.kept.dtype, self.kept.shape)
        if tuple(state["about"]) != about or not same:
            raise MisuseError(f"the saved snapshot is of {state['about']}, this one of {about}")
        if hasher("blake3")(cells_of(kept).view(np.uint8)).digest().hex() != state["digest"]:
            raise MisuseError("the saved snapshot's bytes are not those it was saved with; save it again")
        self.kept = kept.to(self.kept.device, copy=True)


@final
class ExactSnapshot(Snapshot):
    """All cells of a tensor, in the data type as which it is viewed. A NaN seen through a view is like any other."""

    def _keep(self, flat: Tensor) -> Tensor:
        return flat.to(self.view, copy=True)

    def _compare_part(self, part: slice, new: Tensor, limits: Limits, renew: bool, words: Words) -> Changes:
        return compare_blocks(self.kept[part], new, limits, renew=renew, words=words)


@final
class FastSnapshot(Snapshot):
    """One byte an element. Limits other than none cannot be kept to: :meth:`compare` refuses them."""

    def _keep(self, flat: Tensor) -> Tensor:
        self.kept = torch.zeros(flat.numel(), dtype=torch.uint8, device=flat.device)
        self.compare(flat.view(self.shape), NO_LIMITS, renew=True)
        return self.kept

    def _compare_part(self, part: slice, new: Tensor, limits: Limits, renew: bool, words: Words) -> Changes:
        if not limits.none:
            raise MisuseError("a byte an element knows no differences; use mode='exact' for thresholds")
        hist, kept = np.zeros(BINS, np.int64), self.kept[part]
        if is_host_view(new):
            is_float = dtype_of_tensor(new).is_float
            changed = follow_bytes(cells_of(new), kept.numpy(), hist, words, is_float=is_float, renew=renew)
        else:
            changed = follow_on_device(new, kept, hist, words, renew=renew)
        missed = changed * _HASHED_MISSES if new.element_size() > 2 else 0.0
        ulps = tuple(int(count) for count in np.trim_zeros(hist, "b"))
        return Changes(new.numel(), changed, changed, missed, 0, 0, 0, nan, nan, nan, nan, nan, ulps)

"""Send only what the next forward pass would see: entries whose change alters a bf16 weight.

Training keeps float32 weights and computes with their bf16 casts. A change of less than half a unit in the last of
bf16's 8 bits leaves the cast as it was, and at the learning rates of RL post-training that is most changes (about 99 %
a step). They can wait: error feedback keeps them until, together with later ones, they show.

Source: the compute-visible gate of PULSELoCo (Miahi & Belilovsky 2026, arXiv:2602.03839, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thinwire.compress.base import State
from thinwire.compress.sparsify import Sparsifier
from thinwire.errors import MisuseError
from thinwire.tensors.select import top_k

__all__ = ["VisibleTopK", "visible"]


def visible(update: Tensor, reference: Tensor) -> Tensor:
    """Where ``bf16(reference - update)`` differs from ``bf16(reference)`` in a bit (-0.0 is not 0.0), bool ``[numel]``.

    >>> visible(torch.tensor([1e-4, 1e-2]), torch.tensor([1.0, 1.0]))
    tensor([False,  True])
    """
    before = reference.to(torch.bfloat16).view(torch.int16)
    return (reference - update).to(torch.bfloat16).view(torch.int16) != before


@final
@dataclass(frozen=True)
class VisibleTopK(Sparsifier):
    """Of an update that is to be *subtracted* from weights, the elements that change the weights' bf16 casts; of more
    than ``density`` of them, those of largest magnitude. How many that are, down to none, depends on the values.

    The weights come with the state: ``state["reference"]``, float32 ``[numel]``, read and never written;
    :class:`thinwire.integrations.local_steps.LocalSteps` puts its anchor there. Use it under ``ErrorFeedback``;
    without, a weight that moves by less than half a step of bf16 at a time never moves.

    Law: with density 1 and exact values, subtracting what is sent gives the bf16 weights that subtracting everything
    would give.

    ``density`` is also what the ways of reducing reckon with (:meth:`count`): ``mode="auto"`` takes an uncapped one for
    a dense update, so give ``mode="split"`` or ``"gather"``, or a cap near what is visible. ``split`` keeps at most
    ``count`` sums over all ranks; what it does not keep stays in the residuals.

    >>> from thinwire.compress import Layout
    >>> compressor = VisibleTopK()
    >>> state = compressor.init(Layout(((3,),))) | {"reference": torch.tensor([1.0, 1.0, 1e-3])}
    >>> packet, state = compressor.encode(torch.tensor([1e-4, 1e-2, 1e-4]), state)
    >>> compressor.decode(packet)
    tensor([0.0000e+00, 1.0000e-02, 1.0000e-04])

    Raises:
        MisuseError: The density is outside (0, 1], or the state has no weights of the update's length.
    """

    density: float = 1.0

    def select(self, update: Tensor, state: State) -> tuple[Tensor, State]:
        reference = state.get("reference")
        if reference is None or reference.shape != update.shape or reference.dtype != torch.float32:
            what = "none" if reference is None else f"{reference.dtype} of shape {tuple(reference.shape)}"
            raise MisuseError(
                f"what is visible depends on the weights, and there are {what} for an update of {update.numel()}; put "
                'them into state["reference"], flat float32 (LocalSteps does)'
            )
        positions = visible(update, reference).nonzero().view(-1).to(torch.int32)
        due = self.count(update.numel())
        if positions.numel() > due:
            positions = positions[top_k(update.index_select(0, positions), due).indices]
        return positions, {**state, "step": state["step"] + 1}

"""Error feedback: what a worker did not send stays with that worker, and is sent later.

The residual is *local*: ``compensated - what this worker sent``. Keeping ``compensated - the average of what all sent``
instead looks alike on iid data but diverges on skewed shards (docs/gradients.md has both curves). The law, for T steps:
``sum(sent) + residual == sum(updates)``, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from thinwire.compress.base import Compressor, Layout, Packet, State, check_update
from thinwire.compress.sparsify import TopK
from thinwire.errors import MisuseError

__all__ = ["ErrorFeedback"]


@final
@dataclass(frozen=True)
class ErrorFeedback(Compressor):
    """Adds the residual to each update before ``compressor`` sees it (Seide et al. 2014; Karimireddy et al. 2019).

    ``momentum`` is Deep Gradient Compression's momentum correction (Lin et al. 2018, eq. 4-5): what accumulates is
    the velocity ``u = momentum * u + gradient`` rather than the gradient, so that what waits in the residual is not
    discounted by the optimiser's momentum; use a plain SGD without momentum behind it. Where an element is sent, its
    velocity is cleared (factor masking, their eq. 7) unless ``masking`` is off.

    What is sent: the gradient (``momentum=0``) or the velocity. Adam divides by a running mean of squares, which a
    sparse gradient spoils, so with Adam send the *update* instead, as long as the shards are alike:
    :class:`thinwire.integrations.local_steps.LocalSteps` with ``every=1``.

    >>> import torch
    >>> from thinwire.compress import ErrorFeedback, Layout, TopK
    >>> feedback = ErrorFeedback(TopK(density=0.25))
    >>> state = feedback.init(Layout(((4,),)))
    >>> packet, state = feedback.encode(torch.tensor([1.0, 4.0, 2.0, 3.0]), state)
    >>> feedback.decode(packet), state["residual"]
    (tensor([0., 4., 0., 0.]), tensor([1., 0., 2., 3.]))

    Raises:
        MisuseError: The momentum is outside [0, 1).
    """

    compressor: Compressor = field(default_factory=TopK)
    momentum: float = 0.0
    masking: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise MisuseError(f"a momentum of {self.momentum}; give one in [0, 1)", momentum=self.momentum)
        if isinstance(self.compressor, ErrorFeedback):
            raise MisuseError("error feedback around error feedback keeps the residual twice; wrap once")

    def at(self, density: float) -> ErrorFeedback:
        return replace(self, compressor=self.compressor.at(density))

    def init(self, layout: Layout, device: torch.device | str = "cpu") -> State:
        state: State = {
            "residual": torch.zeros(layout.numel, device=device),
            "inner": self.compressor.init(layout, device),
        }
        if self.momentum:
            state["velocity"] = torch.zeros(layout.numel, device=device)
        return state

    def encode(self, update: Tensor, state: State) -> tuple[Packet, State]:
        check_update(update)
        velocity = None
        if self.momentum:
            velocity = self.momentum * state["velocity"] + update
            update = velocity
        compensated = update + state["residual"]
        packet, inner = self.compressor.encode(compensated, state["inner"])
        sent = self.compressor.decode(packet)
        after: State = {"residual": compensated - sent, "inner": inner}
        if velocity is not None:
            after["velocity"] = velocity.masked_fill(sent != 0, 0.0) if self.masking else velocity
        return packet, after

    def decode(self, packet: Packet) -> Tensor:
        return self.compressor.decode(packet)

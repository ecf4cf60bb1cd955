"""Train apart, meet now and then: an outer optimiser over compressed updates (DiLoCo).

Every rank takes its own optimiser's steps on its own data. Every ``every`` steps, what its parameters have moved since
the last meeting (the *pseudo-gradient*) is averaged through a
:class:`~thinwire.integrations.ddp.CompressedAllReduce`, and an outer SGD with Nesterov momentum moves the common
*anchor*, from which all ranks go on.

    exchange = CompressedAllReduce(ErrorFeedback(TopK(density=0.05)))
    outer = LocalSteps(model, optimizer, exchange, every=50, outer_lr=1.0, outer_momentum=0.0)
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        outer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from thinwire.compress.base import Layout
from thinwire.compress.group import sizes_of
from thinwire.compress.sparsify import all_finite
from thinwire.errors import MisuseError
from thinwire.integrations.agreement import agree, digest_of, local
from thinwire.integrations.ddp import CompressedAllReduce

__all__ = ["LocalSteps"]

STATE_VERSION = 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@final
@dataclass
class _Chunk:
    """Parameters of one device that travel together, end to end: ``anchor`` and ``momentum`` are float32 ``[numel]``.

    A parameter was last set to its part of the anchor, *rounded to its own type*. Movement is counted from there, so
    that the anchor accumulates in float32 what a bf16 parameter cannot hold.
    """

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    layout: Layout
    anchor: Tensor
    momentum: Tensor | None

    def pieces(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of every parameter with its part of ``flat``, in its shape."""
        split = torch.split(flat, list(self.layout.numels))
        for parameter, shape, piece in zip(self.parameters, self.layout.shapes, split, strict=True):
            yield local(parameter), piece.view(shape)

    def movement(self) -> Tensor:
        """The pseudo-gradient: what was, less what is."""
        moved = self.anchor.clone()
        for parameter, piece in self.pieces(moved):
            if parameter.dtype != torch.float32:
                piece.copy_(piece.to(parameter.dtype))
            piece.sub_(parameter)
        return moved

    def finite(self) -> bool:
        """Whether all parameters are; the device is waited for once, not once a parameter."""
        sums = [local(parameter).sum(dtype=torch.float32) for parameter in self.parameters]
        return all_finite(torch.stack(sums)) or all(all_finite(local(parameter)) for parameter in self.parameters)

    def to_anchor(self) -> None:
        for parameter, piece in self.pieces(self.anchor):
            parameter.copy_(piece)


@final
class LocalSteps:
    """Local SGD with an outer optimiser (DiLoCo, Douillard et al. 2023, algorithm 1). Making one is collective.

    What is sent is neither a gradient nor a weight but the *movement* of the parameters over ``every`` inner steps, and
    the exchange's compressor, error feedback and accounting apply to it. After every outer step all ranks hold the
    same parameters, bit for bit; in between each has its own. With momentum 0 and ``outer_lr`` 1:
    ``anchor + mean of residuals`` moves by exactly the mean of all ranks' movements, to rounding.

    With ``every=1, outer_lr=1, outer_momentum=0`` this sends *updates* in place of gradients: each rank's optimiser
    proposes a step from its own gradient, and the compressed mean of the proposals is applied. On iid shards that is
    the way to compress under Adam and its kin, whose running mean of squares a sparse gradient spoils. It is not where
    ranks see different labels: each Adam then normalises its own gradient, which costs more than compression does.

    The defaults are DiLoCo's, for ``Quantize`` or no compressor. What error feedback holds back comes later, in bursts
    that a strong outer momentum repeats: below a density of about 10 % use ``outer_lr=1, outer_momentum=0``.

    Args:
        model: its parameters that require a gradient now take part, tied ones once; frozen ones never move and are not
            sent. Parameters may be float32, bfloat16 or float16 (the anchor is float32), or DTensors of ``fully_shard``
            over a mesh of other ranks than the exchange's (then each rank's shard is exchanged with the replicas').
            Buffers are not touched: BatchNorm's statistics stay those of this rank's data, so save one rank's.
        optimizer: the inner one, of any kind. Its state never leaves this rank.
        exchange: made without ``scaler`` and ``optimizer``: movements are in true units and hold the rate already.
        every: inner steps between two outer ones.
        outer_lr, outer_momentum, nesterov: as in ``torch.optim.SGD``. The attribute :attr:`outer_lr` may be set between
            steps, alike on all ranks.
        chunk_numel: elements exchanged at once, which bounds the extra memory; a larger parameter goes alone. Results
            of compressors that let parameters compete depend on it.

    A rank whose parameters are not finite spoils the round for all: every rank goes back to the anchor, residuals and
    outer momentum stay as they were, :attr:`skipped` counts it, and the rank's optimiser forgets its state of the
    parameters concerned. Memory: 4 bytes a parameter for the anchor, 4 for the momentum, and the exchange's residual.

    Raises:
        MisuseError: The ranks start from different parameters or options, or a parameter is of another type.

    >>> from thinwire.compress.group import MemoryGroup
    >>> from thinwire.integrations.ddp import CompressedAllReduce
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> outer = LocalSteps(model, optimizer, CompressedAllReduce(group=MemoryGroup.of(1)[0]), every=2, outer_lr=1.0,
    ...                    outer_momentum=0.0)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(2)).sum().backward()
    ...     optimizer.step()
    ...     print(outer.step(), model.weight.tolist())
    False [[0.5, 0.5]]
    True [[0.0, 0.0]]
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        exchange: CompressedAllReduce,
        *,
        every: int = 50,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        chunk_numel: int = 1 << 26,
    ) -> None:
        if every < 1 or outer_lr <= 0 or not 0 <= outer_momentum < 1 or chunk_numel < 1:
            raise MisuseError(
                f"every={every}, outer_lr={outer_lr}, outer_momentum={outer_momentum}, chunk_numel={chunk_numel}; give "
                "1 or more steps, a positive rate, a momentum in [0, 1) and 1 or more elements"
            )
        self.optimizer = optimizer
        self.every = every
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum
        self.nesterov = nesterov
        self.inner_steps = 0
        """Inner steps since the last outer one."""
        self.skipped = 0
        """Rounds thrown away because some rank's parameters were not finite, or, in parts, because a mean was not."""
        if exchange.scaled:
            raise MisuseError(
                "make the exchange without scaler and optimizer: movements are not scaled for the loss, and what waits "
                "in their residual was taken at the rate of its time"
            )
        self._exchange = exchange
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in named.items():
            if parameter.dtype not in _DTYPES or parameter.is_meta:
                raise MisuseError(
                    f"parameter {name} is {parameter.dtype} on {parameter.device}; local steps take float32, bfloat16 "
                    "and float16 parameters that hold values",
                    parameter=name,
                )
        self._chunks = [_chunk_of(part, bool(outer_momentum)) for part in _parts(named, chunk_numel)]
        options = [every, outer_lr, outer_momentum, nesterov, chunk_numel]
        start = {"options": options, "parameters": list(named), "digest": digest_of(named.values())}
        agree(
            exchange.group,
            start,
            "give all the same options, and start all from the same parameters: the same seed, checkpoint or broadcast",
        )

    def step(self) -> bool:
        """Call it after every ``optimizer.step()``, on all ranks. True where it ended a round: all ranks then hold the
        same parameters.

        Raises:
            RetryError: A rank died or did not answer. Load the last checkpoint.
        """
        self.inner_steps += 1
        if self.inner_steps < self.every:
            return False
        self.outer_step()
        return True

    @torch.no_grad()
    def outer_step(self) -> None:
        """Ends the round now; for the end of training, or before a checkpoint. All ranks must call it."""
        self.inner_steps = 0
        healthy = all(chunk.finite() for chunk in self._chunks)
        if not all(sizes_of(self._exchange.group, int(healthy))):
            self.skipped += 1
            if not healthy:
                self._forget()
        else:
            complete = [self._reduce(chunk) for chunk in self._chunks]
            self.skipped += not all(complete)
        for chunk in self._chunks:
            chunk.to_anchor()

    def _reduce(self, chunk: _Chunk) -> bool:
        """Moves the chunk's anchor; all ranks do the same arithmetic on the same bits."""
        mean = chunk.movement()
        shapes = dict(zip(chunk.names, chunk.layout.shapes, strict=True))
        self._exchange.all_reduce(mean, parts=shapes, given={"reference": chunk.anchor})
        if not all_finite(mean):  # finite movements whose sum overflows: all ranks see it
            return False
        if chunk.momentum is not None:
            chunk.momentum.mul_(self.outer_momentum).add_(mean)
            mean = mean.add_(chunk.momentum, alpha=self.outer_momentum) if self.nesterov else chunk.momentum
        chunk.anchor.add_(mean, alpha=-self.outer_lr)
        return True

    def _forget(self) -> None:
        """A NaN in Adam's moments would spoil every later round."""
        for parameter, state in list(self.optimizer.state.items()):
            held = [value for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()]
            if not all(all_finite(local(tensor)) for tensor in (parameter, *held)):
                del self.optimizer.state[parameter]

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The anchor and the outer momentum, by parameter, which are the same on all ranks, and the place in the round.

        Save with it, for a resumption that is exact to the bit: the model and the inner optimiser of every rank (just
        after an outer step one rank's model will do), and the exchange's ``state_dict()``.
        """
        anchor: dict[str, Tensor] = {}
        momentum: dict[str, Tensor] = {}
        for chunk in self._chunks:
            for kept, flat in ((anchor, chunk.anchor), (momentum, chunk.momentum)):
                if flat is not None:
                    parts = torch.split(flat, list(chunk.layout.numels))
                    kept.update({name: part.clone() for name, part in zip(chunk.names, parts, strict=True)})
        return {
            "version": STATE_VERSION,
            "inner_steps": self.inner_steps,
            "skipped": self.skipped,
            "anchor": anchor,
            "momentum": momentum,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`; the number of ranks may be another. The model is left as it is.

        Raises:
            MisuseError: It is of other parameters.
        """
        if state.get("version") != STATE_VERSION:
            raise MisuseError(f"this state is of version {state.get('version')!r}; this program reads {STATE_VERSION}")
        for chunk in self._chunks:
            for kind, flat in (("anchor", chunk.anchor), ("momentum", chunk.momentum)):
                if flat is None:
                    continue
                parts = torch.split(flat, list(chunk.layout.numels))
                for name, part in zip(chunk.names, parts, strict=True):
                    saved = state[kind].get(name)
                    if saved is None or saved.numel() != part.numel():
                        what = "none" if saved is None else f"{saved.numel()} elements"
                        raise MisuseError(
                            f"the {kind} of parameter {name} has {part.numel()} elements, the state has {what}; load "
                            "the state of the same model and shard",
                            parameter=name,
                        )
                    part.copy_(saved.reshape(-1))
        self.inner_steps, self.skipped = int(state["inner_steps"]), int(state["skipped"])


def _parts(named: Mapping[str, Tensor], numel_max: int) -> Iterator[dict[str, Tensor]]:
    """The parameters of each device, in the model's order, in parts of at most ``numel_max`` elements."""
    for device in dict.fromkeys(local(p).device for p in named.values()):
        part: dict[str, Tensor] = {}
        numel = 0
        for name, parameter in named.items():
            size = local(parameter).numel()
            if local(parameter).device != device:
                continue
            if part and numel + size > numel_max:
                yield part
                part, numel = {}, 0
            part[name] = parameter
            numel += size
        yield part


@torch.no_grad()
def _chunk_of(part: dict[str, Tensor], with_momentum: bool) -> _Chunk:
    values = [local(parameter).detach() for parameter in part.values()]
    anchor = torch.cat([value.reshape(-1).float() for value in values])
    return _Chunk(
        tuple(part),
        tuple(part.values()),
        Layout(tuple(tuple(value.shape) for value in values)),
        anchor,
        torch.zeros_like(anchor) if with_momentum else None,
    )

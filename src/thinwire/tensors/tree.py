"""A model's state as named tensors: one entry a tensor, further names of tied tensors as aliases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from thinwire.errors import MisuseError
from thinwire.tensors.bits import dtype_of_tensor
from thinwire.wire.digests import check_name

__all__ = ["State", "state_of"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class State:
    """Tensors by canonical name, in order of their names, and the aliases of tied ones.

    ``cast`` is the dtype as which floating-point tensors of 16 bits or more are read; None leaves them as they are.
    """

    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    cast: torch.dtype | None = None

    def dtype_name(self, name: str) -> str:
        """Safetensors data type under which a tensor is read."""
        tensor = self.tensors[name]
        if self.casts(tensor):
            return dtype_of_tensor(torch.empty(0, dtype=self.cast)).name
        return dtype_of_tensor(tensor).name

    def casts(self, tensor: torch.Tensor) -> bool:
        """Whether reading this tensor converts it."""
        return self.cast is not None and tensor.dtype in _FLOATS and tensor.dtype != self.cast


def _identity(tensor: torch.Tensor) -> tuple[object, ...] | None:
    if tensor.numel() == 0 or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())


def state_of(model: torch.nn.Module | Mapping[str, torch.Tensor], *, cast: torch.dtype | None = None) -> State:
    """The state of a module or of a state dict. Nothing is copied.

    Names that share one tensor (tied weights) become one entry under the name that sorts first, with aliases.

    Raises:
        MisuseError: an entry is not a tensor, or has a name that cannot be published.

    >>> linear = torch.nn.Linear(2, 1)
    >>> state = state_of({"b": linear.weight, "a": linear.weight})
    >>> list(state.tensors), state.aliases
    (['a'], {'b': 'a'})
    """
    entries = model.state_dict() if isinstance(model, torch.nn.Module) else model
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name in sorted(entries):
        tensor = entries[name]
        if not isinstance(tensor, torch.Tensor):
            raise MisuseError(
                f"state dict entry {name!r} is a {type(tensor).__name__}, not a tensor; pass a dict without it",
                name=name,
            )
        try:
            check_name(name)
        except Exception as error:
            raise MisuseError(f"tensor name {name[:80]!r} cannot be published: {error}") from error
        identity = _identity(tensor)
        if identity is not None and identity in first:
            aliases[name] = first[identity]
            continue
        if identity is not None:
            first[identity] = name
        tensors[name] = tensor.detach()
    return State(tensors, aliases, cast)

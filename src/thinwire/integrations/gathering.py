"""A training model's tensors under its own names, whatever it is wrapped in and however it is sharded."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from thinwire.errors import MisuseError

__all__ = ["gathered", "gathered_state", "is_sharded", "plain_name", "unwrapped"]

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside of DDP, DataParallel and ``torch.compile``.

    >>> inner = torch.nn.Linear(2, 2)
    >>> unwrapped(torch.nn.DataParallel(inner)) is inner
    True
    """
    found: Any = model
    while True:
        if isinstance(found, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            found = found.module
        elif isinstance(getattr(found, "_orig_mod", None), torch.nn.Module):
            found = found._orig_mod
        else:
            plain: torch.nn.Module = found
            return plain


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers of inner modules have put into it.

    >>> plain_name("layers.0._orig_mod.mlp._checkpoint_wrapped_module.up.weight")
    'layers.0.mlp.up.weight'
    """
    return _WRAPPERS.sub("", name).removeprefix(".")


def gathered_state(
    model: torch.nn.Module, *, dtype: torch.dtype | None = None, whole: bool = True
) -> dict[str, torch.Tensor]:
    """The model's state dict with whole tensors. Where it is sharded all processes call this together, and all but
    process 0 get nothing. With ``whole=False`` FSDP2's shards stay what they are.

    Raises:
        MisuseError: DeepSpeed's ZeRO-3 holds the parameters.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise MisuseError(
            "DeepSpeed's ZeRO-3 holds these parameters in pieces of its own; publish from its checkpoints "
            "(zero_to_fp32, then thinwire publish), or train with FSDP2 or ZeRO-2"
        )
    if _is_fsdp1(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found: dict[str, Any] = dict(get_model_state_dict(model, options=options))
        return found
    entries = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    return gathered(entries, dtype=dtype) if whole else entries


def _is_fsdp1(model: torch.nn.Module) -> bool:
    package: Any = sys.modules.get("torch.distributed.fsdp")  # where nobody has imported it, nothing is of its classes
    return package is not None and any(isinstance(m, package.FullyShardedDataParallel) for m in model.modules())


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor, of which a process holds a part."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "full_tensor")


def gathered(entries: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """``entries`` with whole tensors in place of distributed ones; see :func:`gathered_state`.

    One tensor is gathered at a time, in order of the names, then read as ``dtype`` and moved to the host.
    Tied ones stay tied.
    """
    if not any(map(is_sharded, entries.values())):
        return {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in entries.items()}
    mine = dist.get_rank() == 0
    done: dict[int, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for name in sorted(entries):
        tensor = entries[name]
        if id(tensor) not in done:
            whole: Any = tensor.detach()
            if is_sharded(whole):
                whole = whole.full_tensor()
            if mine:
                if dtype is not None and whole.dtype in _FLOATS:
                    whole = whole.to(dtype)
                done[id(tensor)] = whole.cpu()
            else:
                done[id(tensor)] = torch.empty(0)
        if mine:
            found[name] = done[id(tensor)]
    return found

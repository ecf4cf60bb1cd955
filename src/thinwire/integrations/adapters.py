"""PEFT adapters while they train: alone, or merged into their base for the time of a publish.

The one file here that imports PEFT; :mod:`thinwire.integrations.lora` reads saved adapters without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from thinwire.errors import MisuseError
from thinwire.integrations.gathering import gathered, is_sharded, plain_name

__all__ = ["adapter_metadata", "adapter_parameters", "adapter_state", "merged_state", "with_adapter"]

_PREFIX = "base_model.model."


def _active(model: Any) -> str:
    names = [model.active_adapter] if isinstance(model.active_adapter, str) else list(model.active_adapter)
    if len(names) != 1:
        raise MisuseError(f"{len(names)} adapters are active; publish one at a time (model.set_adapter(name))")
    return str(names[0])


def adapter_state(model: Any, *, dtype: torch.dtype | None = None, whole: bool = True) -> dict[str, torch.Tensor]:
    """The active adapter's tensors under the names that ``save_pretrained`` writes; gathered if they are sharded and
    ``whole``.

    Raises:
        MisuseError: several adapters are active.
    """
    from peft import get_peft_model_state_dict

    entries = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    found = get_peft_model_state_dict(model, state_dict=entries, adapter_name=_active(model))
    return gathered(found, dtype=dtype) if whole else dict(found)


def adapter_metadata(model: Any) -> dict[str, str]:
    """The active adapter's configuration as JSON, under ``thinwire.peft``."""
    settings = model.peft_config[_active(model)].to_dict()

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

    return {"thinwire.peft": json.dumps(settings, sort_keys=True, default=plain)}


@contextmanager
def merged_state(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The base's tensors with the active adapter merged in, as ``merge_and_unload`` would leave them.

    It is merged in place, as PEFT does it. When the block ends the base's weights are put back from a copy, bit for
    bit, which PEFT's own ``unmerge_adapter`` does not promise. The copy costs the memory of the adapted layers.

    Raises:
        MisuseError: an adapter is merged already, several are active, its kind cannot be merged, or it is sharded.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = _active(model)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers or model.peft_config[name].is_prompt_learning:
        raise MisuseError(
            f"an adapter of kind {model.peft_config[name].peft_type} has nothing to merge; publish it alone"
        )
    if any(layer.merged for layer in layers):
        raise MisuseError("the adapter is merged already; unmerge it before training goes on (unmerge_adapter)")
    bases = [p for layer in layers for p in layer.get_base_layer().parameters()]
    if any(map(is_sharded, bases)):
        raise MisuseError("a sharded adapter cannot be merged layer by layer; publish it alone (adapters='alone')")
    if not all(p.is_floating_point() for p in bases):
        raise MisuseError("the base is quantised, merging would round it anew; publish the adapter alone")
    kept = [(p, p.detach().clone()) for p in bases]
    try:
        with torch.no_grad():
            model.merge_adapter(adapter_names=[name])
        yield _base_names(model, name)
    finally:
        with torch.no_grad():
            model.unmerge_adapter()
            for parameter, before in kept:
                parameter.copy_(before)


def _base_names(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    prefix = getattr(model.base_model, "prefix", "lora_")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if prefix in name or ".original_module." in name:
            continue
        own = plain_name(name).removeprefix(_PREFIX).replace(".base_layer.", ".")
        own = own.replace(f".modules_to_save.{adapter}.", ".")
        if ".modules_to_save." not in own:
            found[own] = tensor
    return found


def with_adapter(base: torch.nn.Module, metadata: Mapping[str, str]) -> Any:
    """``base`` with an adapter as published versions' metadata describe it, its weights yet to be loaded.

    Raises:
        MisuseError: the metadata are no adapter's, or describe one that does not fit.
    """
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise MisuseError("the store publishes an adapter, which needs PEFT: pip install peft") from error

    family: Any = PeftConfig
    whole: Any = base
    try:
        settings = {**json.loads(metadata["thinwire.peft"]), "inference_mode": True, "base_model_name_or_path": None}
        return get_peft_model(whole, family.from_peft_type(**settings))
    except (KeyError, ValueError, TypeError) as error:
        raise MisuseError(f"the versions' metadata describe no adapter for this model: {error}") from error


def adapter_parameters(model: Any) -> dict[str, torch.Tensor]:
    """The active adapter's parameters themselves, under the names that ``save_pretrained`` writes: to load into."""
    from peft import get_peft_model_state_dict

    entries = dict(model.state_dict(keep_vars=True))
    return dict(get_peft_model_state_dict(model, state_dict=entries, adapter_name=_active(model)))

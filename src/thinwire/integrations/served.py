"""A Transformers model to be loaded from a store: made from a folder's configuration, of the published types."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thinwire.errors import MisuseError, RetryError
from thinwire.stores import open_store
from thinwire.sync.remote import ReadableStore, Remote
from thinwire.sync.share import fetch_map
from thinwire.sync.trust import read_trust
from thinwire.tensors.bits import torch_dtype
from thinwire.wire.chunks import ChunkMap
from thinwire.wire.digests import Tree

__all__ = ["Served", "load_served"]

_Kinds = Tree | ChunkMap  # either tells the data types and shapes of all tensors, and which are tied


@dataclass(slots=True)
class Served:
    """A model to generate with, the tensors that versions set in it, and its tokenizer."""

    model: Any
    tensors: dict[str, torch.Tensor]
    tokenizer: Any

    @property
    def context(self) -> int:
        """The most tokens of prompt and answer together."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 20)

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        found = self.model.generation_config.eos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        return [found] if isinstance(found, int) else list(found or ())


def load_served(folder: str | Path, store: str | ReadableStore, *, device: str = "cpu", **settings: Any) -> Served:
    """The model that ``store`` publishes, of the kind that ``folder`` describes, with weights yet to be loaded.

    ``folder`` is a Hugging Face one with ``config.json`` and a tokenizer. Its weights are not read unless the store
    publishes an adapter alone: then they are the base. No code that lies in it is run.

    Raises:
        MisuseError: there is no such folder, it describes no causal language model or another one than the store
            publishes, or Transformers is not installed (or PEFT, for an adapter).
        StoreUnavailableError: the store has no version.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MisuseError("serving a model needs Transformers: pip install 'thinwire[rl]'") from error

    if not (Path(folder) / "config.json").is_file():
        raise MisuseError(f"there is no config.json in {folder}; name the folder of a Hugging Face model")
    tree, metadata = _published(store, settings)
    local = {"local_files_only": True, "trust_remote_code": False}
    families: Any = (AutoConfig, AutoModelForCausalLM, AutoTokenizer)
    try:
        tokenizer = families[2].from_pretrained(folder, **local)
        alone = metadata.get("thinwire.adapter") == "alone"
        if alone:
            from thinwire.integrations.adapters import with_adapter

            model = with_adapter(families[1].from_pretrained(folder, dtype="auto", **local), metadata)
        else:
            config = families[0].from_pretrained(folder, **local)
            model = families[1].from_config(config, dtype=_dtype(tree), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise MisuseError(f"{folder} describes no causal language model that can be made here: {error}") from error
    model.eval().requires_grad_(False).to(device)
    return Served(model, _retyped(_tensors(model, alone=alone), tree), tokenizer)


def _tensors(model: Any, *, alone: bool) -> dict[str, torch.Tensor]:
    if alone:
        from thinwire.integrations.adapters import adapter_parameters

        return adapter_parameters(model)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: own[name] for name in model.state_dict()}


def _published(store: str | ReadableStore, settings: Mapping[str, Any]) -> tuple[_Kinds, Mapping[str, str]]:
    """Data types and shapes of the newest version, and its metadata; waits a minute for the first one."""
    trust = settings.get("trust")
    opened = open_store(store) if isinstance(store, str) else store
    remote = Remote(opened, retry_s=30.0, trust=None if trust is None else read_trust(trust), in_parts=True)
    deadline = time.monotonic() + 60
    while (newest := remote.newest()) is None:
        if time.monotonic() > deadline:
            raise RetryError("the store holds no versions; is the publisher running?")
        time.sleep(0.5)
    if newest.parts:
        return fetch_map(remote, newest), newest.metadata
    return Tree.parse(remote.fetch(newest.tree, newest.hash)), newest.metadata


def _dtype(tree: _Kinds) -> torch.dtype:
    """The type of most of the state's elements, so that what is computed when a model is made is of that type, too."""
    counts: dict[torch.dtype, int] = {}
    for info in tree.tensors.values():
        kind = torch_dtype(info.dtype)
        if kind.is_floating_point:
            counts[kind] = counts.get(kind, 0) + int(torch.Size(info.shape).numel())
    return max(counts, key=lambda kind: counts[kind], default=torch.float32)


def _retyped(tensors: dict[str, torch.Tensor], tree: _Kinds) -> dict[str, torch.Tensor]:
    """A model's parameters and buffers, each of the type under which it is published."""
    for name, info in tree.tensors.items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.dtype != torch_dtype(info.dtype):
            tensor.data = tensor.data.to(torch_dtype(info.dtype))
    wanted = set(tree.tensors) | set(tree.aliases)
    if set(tensors) != wanted:
        missing, other = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
        raise MisuseError(
            f"the model is not of the published kind: {len(missing)} tensors are missing {missing[:3]}, {len(other)} "
            f"are not published {other[:3]}",
            missing=missing,
            unexpected=other,
        )
    return tensors

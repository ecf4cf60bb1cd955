"""Anchors: full checkpoints as plain safetensors shards that any tool of the ecosystem can open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thinwire.errors import MalformedError
from thinwire.sync.layout import Layout
from thinwire.wire.container import header_bytes, header_length, parse_header
from thinwire.wire.digests import check_name
from thinwire.wire.spec import dtype_of

__all__ = ["Shard", "read_shards", "write_shards"]

Cells = npt.NDArray[np.unsignedinteger]
_ALIASES = "thinwire.aliases"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its name in Hugging Face's convention and its bytes as buffers (views of the cells, not copies)."""

    name: str
    buffers: list[bytes | memoryview]
    tensors: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(len(b) for b in self.buffers)


def write_shards(
    layouts: Mapping[str, Layout],
    cells: Mapping[str, Cells],
    aliases: Mapping[str, str],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes_max: int,
) -> list[Shard]:
    """A state as safetensors files of at most ``shard_bytes_max`` each (or one tensor, if that is larger)."""
    order = sorted(layouts, key=lambda name: (-layouts[name].dtype.cell_bytes, name))  # keeps every tensor aligned
    groups: list[list[str]] = [[]]
    held = 0
    for name in order:
        if groups[-1] and held + layouts[name].size > shard_bytes_max:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += layouts[name].size
    shards = []
    for k, names in enumerate(groups):
        name = "model.safetensors" if len(groups) == 1 else f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors"
        meta = {"format": "pt", **(metadata or {})}
        if aliases:
            meta[_ALIASES] = json.dumps(dict(aliases), sort_keys=True)
        rows = [(n, layouts[n].dtype.name, layouts[n].shape, layouts[n].size) for n in names]
        bodies = [cells[n].data.cast("B") for n in names if layouts[n].size]
        shards.append(Shard(name, [header_bytes(meta, rows), *bodies], tuple(names)))
    return shards


def read_shards(files: Sequence[bytes | memoryview]) -> tuple[dict[str, Layout], dict[str, Cells], dict[str, str]]:
    """The inverse of :func:`write_shards`: layouts, cells (views of ``files``) and aliases.

    Raises:
        MalformedError: a file does not follow the format, or two have a tensor of the same name.
    """
    layouts: dict[str, Layout] = {}
    cells: dict[str, Cells] = {}
    aliases: dict[str, str] = {}
    for data in files:
        view = memoryview(data).cast("B")
        length = header_length(bytes(view[:8]), len(view))
        header = parse_header(bytes(view[8 : 8 + length]), len(view))
        for name, entry in header.entries.items():
            if name in layouts:
                raise MalformedError(f"two files hold a tensor {name[:80]!r}")
            layouts[name] = Layout(dtype_of(entry.dtype), entry.shape)
            body = view[header.data_start + entry.start : header.data_start + entry.stop]
            kind = dtype_of(entry.dtype).cells
            cells[name] = np.frombuffer(body, kind) if len(body) else np.empty(0, kind)
        aliases.update(_read_aliases(header.metadata.get(_ALIASES, "{}")))
    for alias, name in aliases.items():
        if alias in layouts or name not in layouts:
            raise MalformedError(f"alias {alias[:80]!r} is a tensor itself or leads to none")
    return dict(sorted(layouts.items())), cells, aliases


def _read_aliases(text: str) -> dict[str, str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError("a checkpoint's aliases are not JSON") from error
    if not isinstance(value, dict):
        raise MalformedError("a checkpoint's aliases are not an object")
    return {check_name(k): check_name(v) for k, v in value.items()}

"""Rows of a batch in groups, and what a model gives for the groups as one batch again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from thinwire.errors import MisuseError

__all__ = ["groups_of", "join_rows", "take_rows"]

K = TypeVar("K", bound=Hashable)


def groups_of(keys: Sequence[K]) -> dict[K, list[int]]:
    """The rows of each key, in the order in which keys first appear.

    >>> groups_of(["a", "b", "a"])
    {'a': [0, 2], 'b': [1]}
    """
    found: dict[K, list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(key, []).append(row)
    return found


def _rebuilt(like: Any, parts: list[Any]) -> Any:
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def _mapped(like: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    build: Any = type(like)  # Transformers' outputs take their fields by keyword
    return items if build is dict else build(**items)


def take_rows(value: Any, rows: Sequence[int], batch: int) -> Any:
    """``value`` with the given rows of each tensor whose first dimension is ``batch``; all else as it is.

    Looks into tuples, lists and mappings.

    >>> take_rows({"x": torch.tensor([1, 2, 3]), "flag": True}, [0, 2], 3)
    {'x': tensor([1, 3]), 'flag': True}
    """
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 or value.shape[0] != batch:
            return value
        return value[torch.tensor(rows, device=value.device)]
    if isinstance(value, Mapping):
        return _mapped(value, {k: take_rows(v, rows, batch) for k, v in value.items()})
    if isinstance(value, tuple | list):
        return _rebuilt(value, [take_rows(v, rows, batch) for v in value])
    return value


def _has_rows(parts: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> bool:
    return all(part.dim() > 0 and part.shape[0] == len(group) for part, group in zip(parts, rows, strict=True))


def join_rows(parts: Sequence[Any], rows: Sequence[Sequence[int]], where: str = "the output") -> Any:
    """The inverse of :func:`take_rows`: tensors with a row for each of their group's are put together in old order.

    Raises:
        MisuseError: an output has no such rows (a loss, a cache) and differs between the groups.

    >>> join_rows([torch.tensor([1, 3]), torch.tensor([2])], [[0, 2], [1]])
    tensor([1, 2, 3])
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, torch.Tensor) and _has_rows(parts, rows):
        if len({part.shape[1:] for part in parts}) > 1:
            raise MisuseError(f"{where} has rows of another shape in each group; pad them to one length", where=where)
        order = torch.tensor([row for group in rows for row in group], device=first.device)
        return torch.cat(list(parts))[torch.argsort(order)]
    if isinstance(first, Mapping) and all(set(part) == set(first) for part in parts):
        return _mapped(first, {k: join_rows([part[k] for part in parts], rows, f"{where}[{k!r}]") for k in first})
    if isinstance(first, tuple | list) and all(len(part) == len(first) for part in parts):
        each = enumerate(zip(*parts, strict=True))
        return _rebuilt(first, [join_rows(found, rows, f"{where}[{i}]") for i, found in each])
    plain = isinstance(first, bool | int | float | str | None)
    if plain and all(type(part) is type(first) and part == first for part in parts):
        return first
    raise MisuseError(
        f"{where} ({type(first).__name__}) has no row for each input, so that groups cannot be put together; compute "
        "losses outside, and ask for no caches (use_cache=False)",
        where=where,
    )

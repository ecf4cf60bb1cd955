"""A merge as mergekit's YAML describes it, read into a recipe and its inputs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.errors import MisuseError
from thinwire.merge.recipe import Recipe, recipe_of

__all__ = ["MergeConfig", "config_of"]

_KEYS = ("base_model", "models", "merge_method", "parameters", "dtype", "out_dtype", "tokenizer_source")
_OURS_ONLY = {
    "slices": "list whole models under 'models'; gradients and filters give layers their own parameters",
    "modules": "list whole models under 'models'",
    "tokenizer": "the base's tokenizer is copied",
    "chat_template": "the base's is copied",
}


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """What to merge: the base, the fine-tunes (patches, checkpoints or adapters), and how. Paths are as written, or
    relative to the file's folder where that is where they are."""

    base: Path
    models: tuple[Path, ...]
    method: str
    shared: Mapping[str, Any]
    per_task: tuple[Mapping[str, Any], ...]

    def recipe(self, layers: int) -> Recipe:
        """The recipe for a base with so many layers."""
        return recipe_of(self.method, len(self.models), per_task=self.per_task, layers=layers, **self.shared)


def config_of(values: Mapping[str, Any], folder: Path) -> MergeConfig:
    """Read the mapping of a configuration file that lies in ``folder``.

    Raises:
        MisuseError: a key that is unknown (the nearest is told) or not supported, a missing key, a wrong type, an
            unknown method or parameter.
    """
    for key in values:
        if key in _OURS_ONLY:
            raise MisuseError(f"'{key}' is not supported: {_OURS_ONLY[key]}", key=key)
        _known(key, _KEYS, "key")
    for key in ("dtype", "out_dtype"):
        if key == "dtype" and values.get(key) not in (None, "float32"):
            raise MisuseError(f"dtype is {str(values[key])[:40]!r}: sums always run in float32; leave it out")
        if key == "out_dtype" and values.get(key) is not None:
            raise MisuseError("out_dtype: every tensor keeps the base's data type; leave it out")
    if values.get("tokenizer_source") not in (None, "base"):
        raise MisuseError("tokenizer_source: the base's tokenizer is copied; leave it out, or write base")
    base, models = values.get("base_model"), values.get("models")
    if not isinstance(base, str) or not isinstance(values.get("merge_method"), str):
        raise MisuseError("write base_model: PATH and merge_method: NAME")
    if not isinstance(models, list) or not models:
        raise MisuseError("write models: and below it, one a line, '- model: PATH'")
    paths, own = [], []
    for entry in models:
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise MisuseError("an entry of models lacks its 'model: PATH'")
        for key in entry:
            _known(key, ("model", "parameters"), "key of a model")
        if entry["model"] == base:  # mergekit's files may list it; it has no change
            continue
        paths.append(_path(entry["model"], folder))
        own.append(_mapping(entry.get("parameters"), f"parameters of {entry['model'][:80]}"))
    shared = _mapping(values.get("parameters"), "parameters")
    found = MergeConfig(_path(base, folder), tuple(paths), values["merge_method"], shared, tuple(own))
    found.recipe(0)  # wrong names and values are told before anything is read
    return found


def _known(key: object, known: tuple[str, ...], what: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise MisuseError(f"there is no {what} {str(key)[:60]!r}; {advice}", key=str(key)[:60])


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise MisuseError(f"{what} are not 'name: value' a line")
    return dict(value)


def _path(text: str, folder: Path) -> Path:
    beside = folder / text
    return beside if beside.exists() else Path(text)

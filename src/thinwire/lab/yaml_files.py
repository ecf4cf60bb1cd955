"""YAML from outside, read as hostile input: bounded in size and depth, and without anchors, which can make a few lines
stand for billions of values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinwire.errors import MalformedError, MisuseError

__all__ = ["read_mapping"]

_BYTES_MAX = 1 << 20
_DEPTH_MAX = 16


def read_mapping(path: Path, *, extra: str = "merge") -> dict[str, Any]:
    """The mapping that a YAML file holds; its values are plain Python ones.

    Raises:
        MisuseError: there is no such file, or PyYAML is not installed.
        MalformedError: the file is no YAML mapping of texts, is larger than 1 MiB, nested deeper than 16, or has
            anchors.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise MisuseError(f"reading YAML needs PyYAML: pip install 'thinwire[{extra}]'") from None
    if not path.is_file():
        raise MisuseError(f"there is no file {path}", path=str(path))
    with path.open("rb") as file:
        data = file.read(_BYTES_MAX + 1)
    if len(data) > _BYTES_MAX:
        raise MalformedError(f"{path} is larger than {_BYTES_MAX} bytes; that is no configuration", path=str(path))
    depth = 0
    try:
        for event in yaml.parse(data, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise MalformedError(f"{path} has anchors (*{event.anchor}); write the values out", path=str(path))
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEPTH_MAX:
                raise MalformedError(f"{path} is nested deeper than {_DEPTH_MAX}", path=str(path))
        found = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MalformedError(f"{path} is no YAML: {error}", path=str(path)) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise MalformedError(f"{path} holds no mapping; write one 'key: value' a line", path=str(path))
    return found

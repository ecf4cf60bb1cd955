"""Telling apart what a command is pointed at: a patch, a checkpoint or a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from thinwire.errors import MisuseError, RefuseError
from thinwire.wire.spec import FORMAT_PATCH

if TYPE_CHECKING:
    from thinwire.wire.patch import Patch

__all__ = ["kind_of", "read_patch"]

Kind = Literal["patch", "checkpoint", "store"]


def kind_of(name: str) -> Kind:
    """What ``name`` is: only names, and a file's header, are looked at.

    Raises:
        MisuseError: there is no such file or folder, or the folder holds neither checkpoint nor versions.
        MalformedError: a file that is no safetensors file.
    """
    from thinwire.sync.checkpoint import read_header

    if "://" in name:
        return "store"
    path = Path(name)
    if not path.exists():
        raise MisuseError(f"there is no file or folder {name}", path=name)
    if not path.is_dir():
        return "patch" if read_header(path).metadata.get("format") == FORMAT_PATCH else "checkpoint"
    if (path / "manifests").is_dir():
        return "store"
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return "checkpoint"
    raise MisuseError(f"{name} is a folder that holds neither a checkpoint nor published versions", path=name)


def read_patch(path: Path) -> Patch:
    """A patch, its file mapped into memory; all is checked that can be without its base.

    Raises:
        MisuseError: there is no such file.
        MalformedError, UnsupportedError: it is not a patch, or not one that can be read.
    """
    from thinwire.sync.files import map_private
    from thinwire.wire.patch import Patch

    if not path.is_file():
        raise MisuseError(f"there is no patch {path}", path=str(path))
    data = map_private(path) if path.stat().st_size else b""
    try:
        return Patch.parse(data)  # type: ignore[arg-type]
    except RefuseError as error:
        raise type(error)(f"{path}: {error}", **{**error.facts, "path": str(path)}) from error

"""Methods and tasks by name: each is one file in its folder, or a file of yours, named by its path.

Names are those of the files, with hyphens, so that listing them imports nothing.

>>> "random-mask" in names("method"), "gcd" in names("task")
(True, True)
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, Literal

from thinwire.errors import MisuseError

__all__ = ["Kind", "find", "names"]

Kind = Literal["method", "task"]
_HERE = Path(__file__).parent


def names(kind: Kind) -> list[str]:
    """All that lie in the package, in the order of the alphabet."""
    files = (_HERE / f"{kind}s").glob("*.py")
    return sorted(file.stem.replace("_", "-") for file in files if file.stem not in ("__init__", "base"))


def find(kind: Kind, name: str) -> Any:
    """The ``METHOD`` or ``TASK`` of that name, or of the file that ``name`` is the path of (``mine/half.py``).

    Raises:
        MisuseError: there is no such name (near ones are told) or file, or the file does not define it.
    """
    if name.endswith(".py"):
        return _attribute(_load(kind, Path(name)), kind, name)
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise MisuseError(f"there is no {kind} {name[:60]!r}; {hint}. One of your own is named by its file's path")
    module = importlib.import_module(f"thinwire.lab.sparserl.{kind}s.{name.replace('-', '_')}")
    return _attribute(module, kind, name)


def _load(kind: Kind, path: Path) -> Any:
    if not path.is_file():
        raise MisuseError(f"there is no file {path} with a {kind}")
    name = f"thinwire_sparserl_{kind}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise MisuseError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise MisuseError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def _attribute(module: Any, kind: Kind, name: str) -> Any:
    from thinwire.lab.sparserl.methods.base import Method
    from thinwire.lab.sparserl.tasks.base import TaskEntry

    found = getattr(module, kind.upper(), None)
    expected = Method if kind == "method" else TaskEntry
    if not isinstance(found, expected):
        raise MisuseError(f"{name} defines no {kind.upper()} of class {expected.__name__}")
    return found

"""Options as frozen dataclasses: one field says the name, the default, the bounds and the help of an option.

The command line, the YAML file and the Python call are all made from the same fields, so that none can have an option
that another lacks. Importing this module imports neither torch nor YAML.

>>> @dataclass(frozen=True, kw_only=True)
... class Oven:
...     degrees: int = option(180, "How hot.", "Heat", least=0, most=300)
...     mode: str = option("fan", "Which heat.", "Heat", choices=("fan", "grill"))
>>> print(to_yaml(Oven(degrees=200)), end="")
# Heat
degrees: 200  # How hot.
mode: fan  # Which heat. One of fan, grill.
>>> from_mapping(Oven, {"degrees": "hot"})
Traceback (most recent call last):
...
thinwire.errors.MisuseError: degrees is 'hot'; give a whole number
>>> from_mapping(Oven, {"degress": 200})
Traceback (most recent call last):
...
thinwire.errors.MisuseError: there is no option degress; did you mean degrees?
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from thinwire.errors import MalformedError, MisuseError

__all__ = ["Option", "check", "from_mapping", "from_yaml", "option", "options_of", "to_mapping", "to_yaml"]

T = TypeVar("T")
_FILE_BYTES_MAX = 1 << 20
_NO_TEXTS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # to YAML 1.1


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of one option: ``kind`` is str, int, float or bool; ``optional`` ones may be None.

    ``least`` and ``most`` are inclusive bounds, ``above`` and ``below`` exclusive ones.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    section: str
    choices: tuple[str, ...]
    least: float | None
    most: float | None
    above: float | None
    below: float | None

    def parse(self, value: Any) -> Any:
        """``value`` as this option holds it.

        Raises:
            MisuseError: it has the wrong type, is not one of the choices or is out of bounds.
        """
        if value is None and self.optional:
            return None
        value = self._typed(value)
        if self.choices and value not in self.choices:
            raise MisuseError(f"{self.name} is {value!r}; give one of {', '.join(self.choices)}", option=self.name)
        if self.kind in (int, float) and not self._within(value):
            raise MisuseError(f"{self.name} is {value}; give a number {self.bounds}", option=self.name)
        return value

    def _typed(self, value: Any) -> Any:
        if self.kind is float and isinstance(value, str):
            with suppress(ValueError):
                value = float(value)  # YAML 1.1 reads 1e-3, without a point, as a string
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.kind or (isinstance(value, float) and not math.isfinite(value)):
            wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[self.kind]
            raise MisuseError(f"{self.name} is {value!r}; give {wanted}", option=self.name)
        return value

    def _within(self, value: float) -> bool:
        return not (
            (self.least is not None and value < self.least)
            or (self.most is not None and value > self.most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    @property
    def text(self) -> str:
        """The help, with the choices there are."""
        return self.help + (f" One of {', '.join(self.choices)}." if self.choices else "")

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)


def option(
    default: Any,
    help: str,
    section: str,
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that is an option, under the heading ``section`` of help and YAML."""
    facts = {"help": help, "section": section, "choices": tuple(choices)}
    return field(default=default, metadata={**facts, "least": least, "most": most, "above": above, "below": below})


def options_of(config_type: type) -> list[Option]:
    """The options of a dataclass, section by section: in the order of its attribute ``sections`` if it has one, else
    in that of the fields."""
    hints = get_type_hints(config_type)
    found = [_option(x, hints[x.name]) for x in fields(config_type) if "section" in x.metadata]
    sections = [*getattr(config_type, "sections", ()), *(x.section for x in found)]
    return sorted(found, key=lambda x: sections.index(x.section))


def _option(item: Field[Any], hint: Any) -> Option:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    (kind,) = (x for x in kinds if x is not type(None))
    return Option(item.name, kind, type(None) in kinds, item.default, **item.metadata)


def check(config: Any) -> None:
    """Check every option of ``config``; for its ``__post_init__``.

    Raises:
        MisuseError: one has the wrong type or is out of bounds.
    """
    for item in options_of(type(config)):
        object.__setattr__(config, item.name, item.parse(getattr(config, item.name)))


def from_mapping(config_type: type[T], values: Mapping[str, object]) -> T:
    """A config with these options; all others keep their defaults. ``-`` and ``_`` are the same in names.

    Raises:
        MisuseError: there is no such option (the nearest name is told), or one has a value that it cannot have.
    """
    known = {x.name: x for x in options_of(config_type)}
    given: dict[str, object] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise MisuseError(f"there is no option {key}; {advice}", option=str(key))
        given[name] = known[name].parse(value)
    return config_type(**given)


def to_mapping(config: Any) -> dict[str, Any]:
    """Options by name, of plain types."""
    return {x.name: getattr(config, x.name) for x in options_of(type(config))}


def from_yaml(config_type: type[T], path: Path, overrides: Mapping[str, object]) -> T:
    """The options of a YAML file, and ``overrides`` over them.

    Raises:
        MisuseError: as :func:`from_mapping`; or there is no such file, or PyYAML is not installed.
        MalformedError: the file is no YAML mapping, or larger than 1 MiB.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise MisuseError("reading YAML needs PyYAML: pip install 'thinwire[train]'") from None
    with path.open("rb") as file:
        data = file.read(_FILE_BYTES_MAX + 1)
    if len(data) > _FILE_BYTES_MAX:
        raise MalformedError(f"{path} is larger than {_FILE_BYTES_MAX} bytes; that is no configuration", path=str(path))
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MalformedError(f"{path} is no YAML: {error}", path=str(path)) from error
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise MalformedError(f"{path} holds a {type(found).__name__}; write one 'option: value' a line", path=str(path))
    try:
        return from_mapping(config_type, {str(key).replace("-", "_"): x for key, x in found.items()} | dict(overrides))
    except MisuseError as error:
        raise MisuseError(f"{path}: {error}", path=str(path), **error.facts) from error


def to_yaml(config: Any) -> str:
    """A YAML file with every option, its help beside it; :func:`from_yaml` reads it back to an equal config."""
    lines: list[str] = []
    section = ""
    for item in options_of(type(config)):
        if item.section != section:
            lines += ["", f"# {item.section}"] if section else [f"# {item.section}"]
            section = item.section
        value = getattr(config, item.name)
        lines.append(f"{item.name}: {_scalar(value)}  # {item.text}")
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    """A YAML scalar: as it is where that is plainly a text, else JSON's, which is YAML's but for characters that JSON
    writes as surrogate pairs."""
    if isinstance(value, str) and re.fullmatch("[a-z]+[a-z0-9-]*", value) and value not in _NO_TEXTS:
        return value
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e]", lambda found: f"\\U{ord(found[0]):08x}", text)

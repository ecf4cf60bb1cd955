"""A recipe: a method and its parameters, for each task and each tensor, in mergekit's vocabulary.

A setting is a number, a list of numbers, or conditions on the tensor's name:

=======================================  ==========================================================================
``0.5``                                  the same everywhere
``[0.2, 0.8]``                           a gradient over the layers, linear between its points
``[{"filter": "mlp", "value": 0.2},``    the first whose ``filter`` is part of the tensor's name (or, with ``*``, ``?``
``{"value": 0.5}]``                      or ``[`` in it, matches the whole name); without a filter it always holds
=======================================  ==========================================================================

The layer is the first number between dots in a name (``model.layers.11.mlp...``). Tensors outside the layers are at the
gradient's start if they embed (``embed``, ``wte``, ``wpe``), else at its end, as mergekit has them.

>>> recipe = recipe_of("ties", 2, weight=[1.0, 0.5], density={"filter": "mlp", "value": 0.2}, layers=3)
>>> recipe.at("model.layers.2.mlp.up_proj.weight").tasks
({'weight': 1.0, 'density': 0.2}, {'weight': 0.5, 'density': 0.2})
>>> recipe.at("model.layers.2.attn.weight").tasks[0]["density"]
1.0
>>> recipe_of("ties", 2, densty=0.5)
Traceback (most recent call last):
...
thinwire.errors.MisuseError: ties has no parameter 'densty'; did you mean density?
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from thinwire.errors import MisuseError
from thinwire.merge.methods import method_of
from thinwire.merge.methods.base import Method, Parameter

__all__ = ["Recipe", "Resolved", "layer_of", "layers_of", "recipe_of"]

_LAYER = re.compile(r"(?:^|\.)(\d{1,6})\.")
_EMBEDS = ("embed", "wte", "wpe")
_CONDITIONS_MAX = 1000


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to: the first number between dots in its name.

    >>> layer_of("model.layers.11.mlp.up_proj.weight"), layer_of("lm_head.weight")
    (11, None)
    """
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def layers_of(names: Iterable[str]) -> int:
    """The number of layers: one more than the highest."""
    return max((layer + 1 for layer in map(layer_of, names) if layer is not None), default=0)


@dataclass(frozen=True, slots=True)
class Resolved:
    """Parameters for one tensor: those that tasks share, and those of each task, by mergekit's names."""

    shared: Mapping[str, Any]
    tasks: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method, the settings all share, and those of each task, which go before. ``layers`` spans the gradients.
    ``survey`` is what the method has to know of all tensors, one number a task
    (:func:`thinwire.merge.tensor.surveyed`)."""

    method: Method
    shared: Mapping[str, Any]
    tasks: tuple[Mapping[str, Any], ...]
    layers: int = 0
    survey: tuple[float, ...] | None = None

    def at(self, name: str) -> Resolved:
        """All parameters for the tensor ``name``.

        Raises:
            MisuseError: a setting has the wrong type or is out of bounds.
        """
        share = self._share(name)
        shared: dict[str, Any] = {}
        tasks: list[dict[str, Any]] = [{} for _ in self.tasks]
        for key, parameter in self.method.parameters.items():
            if not parameter.per_task:
                shared[key] = _value(key, parameter, [self.shared.get(key)], name, share)
                continue
            for own, found in zip(self.tasks, tasks, strict=True):
                found[key] = _value(key, parameter, [own.get(key), self.shared.get(key)], name, share)
        shared["all_weights"] = tuple(task.get("weight", 1.0) for task in tasks)
        shared["survey"] = self.survey
        return Resolved(shared, tuple(tasks))

    def _share(self, name: str) -> float:
        layer = layer_of(name)
        if layer is None:
            return 0.0 if any(word in name for word in _EMBEDS) else 1.0
        return layer / (self.layers - 1) if self.layers > 1 else 0.0


def _value(key: str, parameter: Parameter, settings: Sequence[Any], name: str, share: float) -> Any:
    for setting in settings:
        found = _evaluate(key, parameter, setting, name, share)
        if found is not None:
            return found
    return parameter.default


def _evaluate(key: str, parameter: Parameter, setting: Any, name: str, share: float) -> Any:
    """``setting`` for one tensor; None if it says nothing about it."""
    if setting is None:
        return None
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return _checked(key, parameter, setting)
    if len(setting) > _CONDITIONS_MAX:
        raise MisuseError(f"{key} has {len(setting)} entries; at most {_CONDITIONS_MAX} are read")
    if not any(isinstance(entry, Mapping) for entry in setting):
        return _gradient([_checked(key, parameter, entry) for entry in setting], share)
    for entry in setting:
        if not isinstance(entry, Mapping) or not set(entry) <= {"filter", "value"} or "value" not in entry:
            raise MisuseError(f"{key}: {str(entry)[:60]} is no condition; write {{filter: PART-OF-A-NAME, value: 0.5}}")
        pattern = entry.get("filter")
        if pattern is None or pattern == "*" or _matches(str(pattern), name):
            if isinstance(entry["value"], Mapping):
                raise MisuseError(f"{key}: a condition's value is a number or a list of numbers")
            return _evaluate(key, parameter, entry["value"], name, share)
    return None


def _matches(pattern: str, name: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    return pattern in name


def _gradient(values: list[Any], share: float) -> Any:
    if not values:
        return None
    at = share * (len(values) - 1)
    low = int(at)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return values[low]
    high = min(len(values) - 1, low + 1)
    return (1 - (at - low)) * values[low] + (at - low) * values[high]


def _checked(key: str, parameter: Parameter, value: Any) -> Any:
    default = parameter.default
    if isinstance(default, str):
        if value not in parameter.choices:
            raise MisuseError(f"{key} is {str(value)[:40]!r}; give one of {', '.join(parameter.choices)}")
        return value
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise MisuseError(f"{key} is {str(value)[:40]!r}; give true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MisuseError(f"{key} is {str(value)[:40]!r}; give a number")
    if not parameter.least <= value <= parameter.most:
        raise MisuseError(f"{key} is {value}; give a number from {parameter.least:g} to {parameter.most:g}")
    return value if isinstance(default, int) else float(value)


def recipe_of(
    method: str,
    tasks: int,
    *,
    per_task: Sequence[Mapping[str, Any]] | None = None,
    layers: int = 0,
    **settings: Any,
) -> Recipe:
    """A recipe for ``tasks`` fine-tunes. A setting of a parameter that each task has (``weight``, ``density``,
    ``gamma``, DELLA's ``epsilon``) may be a list of one setting a task; conditions and gradients of one task go into
    ``per_task``. ``lambda_`` stands for ``lambda``. What is None keeps its default.

    Raises:
        MisuseError: an unknown method or parameter (the nearest name is told), a list of another length, or a value of
            the wrong type or out of bounds.
    """
    found = method_of(method)
    if tasks < 1:
        raise MisuseError("there is nothing to merge; give at least one patch")
    own: list[dict[str, Any]] = [dict(entry) for entry in (per_task or [{}] * tasks)]
    if len(own) != tasks:
        raise MisuseError(f"parameters for {len(own)} tasks were given, there are {tasks}")
    shared: dict[str, Any] = {}
    for key, value in settings.items():
        name = "lambda" if key == "lambda_" else key
        _check_name(found, name)
        if value is None:
            continue
        listed = isinstance(value, list | tuple) and not any(isinstance(v, Mapping) and "value" in v for v in value)
        if found.parameters[name].per_task and listed:
            if len(value) != tasks:
                raise MisuseError(f"{len(value)} values of {name} were given for {tasks} tasks; give one for each")
            for entry, one in zip(own, value, strict=True):
                entry.setdefault(name, one)
        else:
            shared[name] = value
    for entry in own:
        for name in entry:
            _check_name(found, name)
            if not found.parameters[name].per_task:
                raise MisuseError(f"{name} is the same for all tasks; give it among the common parameters")
    recipe = Recipe(found, shared, tuple(own), layers)
    recipe.at("")  # so that a wrong value is found before any work
    return recipe


def _check_name(method: Method, name: str) -> None:
    if name not in method.parameters:
        near = difflib.get_close_matches(name, method.parameters, n=1)
        advice = f"did you mean {near[0]}?" if near else f"it has {', '.join(method.parameters)}"
        raise MisuseError(f"{method.name} has no parameter {name!r}; {advice}", parameter=name)

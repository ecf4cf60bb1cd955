"""Merging fine-tunes of one base as sparse deltas: time and memory follow the changed weights, not all of them.

The package can be called, which is :func:`thinwire.integrations.merging.merge`, and knows ``Continual``
(:mod:`thinwire.integrations.continual`). Both stand above it: they are looked up when they are used, and nothing in
here builds on them.

>>> import torch, thinwire
>>> from thinwire.integrations.merging import patch_between
>>> base = {"w": torch.tensor([1.0, 2.0, 3.0])}
>>> patches = [patch_between(base, {"w": torch.tensor(new)}) for new in ([2.0, 2.0, 3.0], [3.0, 2.0, 5.0])]
>>> thinwire.merge(base, patches, weights=[0.5, 0.5], method="task_arithmetic")["w"]
tensor([2.5000, 2.0000, 4.0000])
>>> thinwire.merge.Continual(base).names
[]
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_ABOVE = {"Continual": "thinwire.integrations.continual"}


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("thinwire.integrations.merging").merge(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name in _ABOVE:
        return getattr(import_module(_ABOVE[name]), name)
    raise AttributeError(f"module 'thinwire.merge' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Callable

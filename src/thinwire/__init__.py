"""thinwire: send only what changed; prove that what arrived is the same.

>>> import torch, thinwire
>>> model = torch.nn.Linear(8, 8)
>>> report = thinwire.Publisher("memory://doc-package").publish(model, step=0)
>>> thinwire.Consumer("memory://doc-package").load(torch.nn.Linear(8, 8)).digest == report.digest
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinwire import merge, optim
    from thinwire.errors import ThinwireError
    from thinwire.integrations.flower import SparseSync
    from thinwire.integrations.flower_mod import SparseSyncMod
    from thinwire.integrations.router import SparseTaskRouter
    from thinwire.probe.tracker import SparsityTracker
    from thinwire.stores import open_store
    from thinwire.sync.consumer import ApplyResult, Consumer, Version
    from thinwire.sync.publisher import Publisher, PublishReport
    from thinwire.sync.sharded_consumer import ShardedConsumer
    from thinwire.sync.sharded_publisher import ShardedPublisher

__version__ = "0.1.0"
__all__ = [
    "ApplyResult",
    "Consumer",
    "PublishReport",
    "Publisher",
    "ShardedConsumer",
    "ShardedPublisher",
    "SparseSync",
    "SparseSyncMod",
    "SparseTaskRouter",
    "SparsityTracker",
    "ThinwireError",
    "Version",
    "__version__",
    "merge",
    "open_store",
    "optim",
]

_HOMES = {
    "ApplyResult": "thinwire.sync.consumer",
    "Consumer": "thinwire.sync.consumer",
    "PublishReport": "thinwire.sync.publisher",
    "Publisher": "thinwire.sync.publisher",
    "ShardedConsumer": "thinwire.sync.sharded_consumer",
    "ShardedPublisher": "thinwire.sync.sharded_publisher",
    "SparseSync": "thinwire.integrations.flower",
    "SparseSyncMod": "thinwire.integrations.flower_mod",
    "SparseTaskRouter": "thinwire.integrations.router",
    "SparsityTracker": "thinwire.probe.tracker",
    "ThinwireError": "thinwire.errors",
    "Version": "thinwire.sync.consumer",
    "open_store": "thinwire.stores",
}


def __getattr__(name: str) -> Any:  # torch and numba are imported when they are first needed
    if name in ("merge", "optim"):
        return import_module(f"thinwire.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'thinwire' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

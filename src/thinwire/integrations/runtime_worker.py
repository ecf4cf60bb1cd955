"""One worker of an inference engine: its model, and a thread that prepares its next version.

Imports nothing heavy before a store is opened: engines import it in every process.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from thinwire.errors import MisuseError

__all__ = ["WorkerSync"]


class WorkerSync:
    """``model`` has ``named_parameters`` and ``load_weights``, as vLLM's and SGLang's have. ``settings`` are a
    :class:`~thinwire.integrations.runtime_sync.RuntimeSync`'s."""

    def __init__(self, model: Any, store: Any, settings: Mapping[str, Any]) -> None:
        from thinwire.integrations.runtime_sync import RuntimeSync

        self.sync = RuntimeSync(store, dict(model.named_parameters()), model.load_weights, **settings)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def open(self, version: int | None) -> dict[str, Any]:
        """Load a version whole."""
        return asdict(self.sync.open(version=version))

    def prepare(self, version: int) -> None:
        """Begin to prepare ``version``, in the background."""
        self._join()

        def run() -> None:
            try:
                self.sync.prepare(version)
            except Exception as error:  # told by ready()
                self._error = error

        self._error = None
        self._thread = threading.Thread(target=run, name="thinwire-prepare", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def ready(self) -> dict[str, Any]:
        """Whether the background is done, with what version, or with what error."""
        busy = self._thread is not None and self._thread.is_alive()
        error = None if self._error is None else f"{type(self._error).__name__}: {self._error}"
        return {"busy": busy, "version": None if busy else self.sync.ready, "error": error}

    def swap(self, version: int) -> dict[str, Any]:
        """Write ``version``; it is prepared first if it has not been."""
        self._join()
        if self.sync.ready != version:
            self.sync.prepare(version)
        if self.sync.ready not in (None, version):
            raise MisuseError(f"a worker is ready for version {self.sync.ready}, not {version}; ask for one at a time")
        report = self.sync.swap() or self.sync.at
        assert report is not None
        return asdict(report)

"""SGLang at a store's newest version, through its hook for weight loaders.

::

    engine = sglang.Engine(model_path=..., custom_weight_loader=[sglang_loader.HOOK])
    follower = sglang_loader.Follower(engine, "s3://bucket/run")
    while True:
        follower.prepare()       # each rank fetches, decodes and proves in the background
        engine.generate(...)
        follower.swap()          # changed elements are written into its fused tensors

SGLang hands its model, and the tensors of ``update_weights_from_tensor``, to the loader that ``load_format`` names.
Here these tensors are one: a message that says what to do. The weights come from the store.

This module was run against a stand-in that loads by SGLang's rules, not against SGLang; see ``docs/engines.md``.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from thinwire.errors import MalformedError, MisuseError, RetryError, ThinwireError
from thinwire.integrations.runtime_worker import WorkerSync

__all__ = ["HOOK", "Follower", "load", "message"]

HOOK = "thinwire.integrations.sglang_loader.load"
"""What SGLang's ``--custom-weight-loader`` is given."""

MESSAGE = "thinwire.message"
_log = logging.getLogger(__name__)
_workers: WeakKeyDictionary[Any, WorkerSync] = WeakKeyDictionary()  # by model; a hook is a function, so here it lives


def message(**facts: Any) -> list[tuple[str, torch.Tensor]]:
    """A message to :func:`load`, as the tensors that SGLang carries.

    >>> message(do="ready", report="/tmp/reports")[0][1].dtype
    torch.uint8
    """
    return [(MESSAGE, torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8))]


def load(model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's hook: does what the message says, and writes what came of it to ``report``/``rank``.json.

    Errors of thinwire are told there and logged, not raised: SGLang's scheduler would end by them.
    """
    entries = dict(named_tensors)
    if set(entries) != {MESSAGE}:
        raise MalformedError(f"this loader takes a message of thinwire, not tensors ({sorted(entries)[:3]})")
    facts = json.loads(bytes(entries[MESSAGE].cpu().numpy()))
    try:
        told = _do(model, facts)
    except ThinwireError as error:
        _log.error("%s: %s", facts.get("do"), error)
        told = {"error": f"{type(error).__name__}: {error}"}
    rank = dist.get_rank() if dist.is_initialized() else 0
    path = Path(facts["report"]) / f"{rank}.json"
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"number": facts["number"], "told": told}))
    os.replace(scratch, path)


def _do(model: Any, facts: Mapping[str, Any]) -> Any:
    if facts["do"] == "open":
        _workers[model] = WorkerSync(model, facts["store"], facts["settings"])
        return _workers[model].open(facts["version"])
    if model not in _workers:
        raise MisuseError("no store is open for this model; begin with a Follower")
    worker = _workers[model]
    if facts["do"] == "prepare":
        return worker.prepare(facts["version"])
    if facts["do"] == "ready":
        return worker.ready()
    if facts["do"] == "swap":
        return worker.swap(facts["version"])
    if facts["do"] == "verify":
        return worker.sync.verify()
    raise MalformedError(f"a message asks for {str(facts['do'])[:40]!r}, which this loader does not know")


class Follower:
    """Keeps an ``sglang.Engine`` at a store's newest version, between calls of ``generate``.

    Args:
        engine: made with ``custom_weight_loader=[sglang_loader.HOOK]``.
        store: a URL or path that every rank can reach.
        ranks: how many ranks hold a part of the model (``tp_size``).
        reports: a folder that this process and every rank share; a temporary one by default.
        settings: a consumer's: ``trust``, ``retry_s``, ``threads``, ...

    Raises:
        RetryError: a rank could not do what was asked; the version served stays.
    """

    def __init__(
        self, engine: Any, store: str, *, ranks: int = 1, reports: str | os.PathLike[str] | None = None, **settings: Any
    ) -> None:
        from thinwire.integrations.newest import Newest

        self._engine, self._ranks = engine, ranks
        self._folder = tempfile.TemporaryDirectory()
        self._reports = Path(self._folder.name if reports is None else reports)
        self._number = 0
        self._newest = Newest(store, settings)
        first = self._ask(do="open", store=store, version=self._newest(), settings=settings)
        self.at: dict[str, Any] = first[0]
        self._target: int | None = None

    def _ask(self, *, flush: bool = False, **facts: Any) -> list[Any]:
        self._number += 1
        asked = message(**facts, report=str(self._reports), number=self._number)
        self._engine.update_weights_from_tensor(asked, load_format=HOOK, flush_cache=flush)
        told = []
        for rank in range(self._ranks):
            path = self._reports / f"{rank}.json"
            found = json.loads(path.read_text()) if path.exists() else {}
            if found.get("number") != self._number:
                raise RetryError(f"rank {rank} of {self._ranks} has not answered in {self._reports}; is it shared?")
            told.append(found["told"])
        errors = [one["error"] for one in told if isinstance(one, dict) and one.get("error")]
        if errors:
            raise RetryError(f"{len(errors)} of {self._ranks} ranks failed: {errors[0]}")
        return told

    def prepare(self) -> int | None:
        """Let the ranks begin with the newest version; its number, or None if none is newer. Returns at once."""
        newest = self._newest()
        if newest > max(self.at["version"], self._target or 0):
            self._ask(do="prepare", version=newest)
            self._target = newest
        return self._target

    def swap(self) -> dict[str, Any] | None:
        """Go to the version that was prepared, once all ranks are ready; None without one."""
        if self._target is None:
            return None
        target, self._target = self._target, None
        while any(state["busy"] for state in self._ask(do="ready")):
            time.sleep(0.02)
        began = time.perf_counter()
        reports = self._ask(do="swap", version=target, flush=True)
        if len({report["digest"] for report in reports}) > 1:
            raise MisuseError("ranks hold different versions; make a new Follower")
        pause = time.perf_counter() - began
        self.at = {**reports[0], "write_s": max(report["pause_s"] for report in reports), "pause_s": pause}
        return self.at

    def verify(self) -> None:
        """Compare what the ranks hold with the version, bit by bit."""
        self._ask(do="verify")

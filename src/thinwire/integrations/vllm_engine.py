"""vLLM at a store's newest version: patches written in place into its fused tensors, while it serves.

::

    llm = LLM(model, worker_extension_cls="thinwire.integrations.vllm_engine.WorkerExtension")
    follower = Follower(llm, "s3://bucket/run")
    while True:
        follower.prepare()                    # workers fetch, decode and prove in the background
        outputs = llm.generate(prompts, ...)
        follower.swap()                       # changed elements are written; the pause is reported

With ``AsyncLLM``, and so with a server, :func:`follow` does that in a task of its own. Installing thinwire also
registers the weight-transfer backend ``thinwire``, for who drives vLLM by its own calls: ``init_info`` is
``{"store": URL}``, ``update_info`` is ``{}`` or ``{"version": N}``.

Whole models of 16 or 32 bits a weight only; vLLM must hold them as its loader leaves them: no quantised models, no
layers whose weights are shuffled after loading (some mixtures of experts), no LoRA. On a CPU vLLM packs linear weights
away; :func:`keep_cpu_weights` stops that. See ``docs/engines.md``.

Numba is imported only once a store is opened: vLLM 0.32 fails to start a worker in a process that has loaded it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from thinwire.errors import MisuseError, ObjectNotFoundError, RetryError
from thinwire.integrations.newest import Newest
from thinwire.integrations.runtime_worker import WorkerSync

__all__ = ["Follower", "Swap", "WorkerExtension", "follow", "keep_cpu_weights", "register"]

BACKEND = "thinwire"
_READY_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Swap:
    """All workers are at ``version``. ``pause_s``: how long the engine stood still, as its driver saw it; ``write_s``:
    how long the slowest worker wrote; ``prepare_s``: what the slowest one did before, while the engine served."""

    version: int
    step: int | None
    digest: str
    elements: int
    bytes_fetched: int
    prepare_s: float
    write_s: float
    pause_s: float


class WorkerExtension:
    """What vLLM's workers get with ``worker_extension_cls``: methods for ``collective_rpc``."""

    vllm_config: Any
    model_runner: Any

    def thinwire_open(self, store: str, version: int | None, settings: dict[str, Any]) -> dict[str, Any]:
        """Load a version whole and find out where its tensors lie."""
        from vllm.config import set_current_vllm_config

        _refuse_quantised(self.vllm_config.model_config)
        self._thinwire = WorkerSync(self.model_runner.get_model(), store, settings)
        with set_current_vllm_config(self.vllm_config):
            return self._thinwire.open(version)

    def thinwire_prepare(self, version: int) -> None:
        """Begin to prepare a version; returns at once."""
        self._thinwire_sync().prepare(version)

    def thinwire_ready(self) -> dict[str, Any]:
        """How far that is."""
        return self._thinwire_sync().ready()

    def thinwire_swap(self, version: int) -> dict[str, Any]:
        """Write it."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            return self._thinwire_sync().swap(version)

    def thinwire_verify(self) -> None:
        """Compare this worker's tensors with the version's, bit by bit."""
        self._thinwire_sync().sync.verify()

    def _thinwire_sync(self) -> WorkerSync:
        found = getattr(self, "_thinwire", None)
        if not isinstance(found, WorkerSync):
            raise MisuseError("no store is open in this worker; call thinwire_open first (Follower does)")
        return found


def _refuse_quantised(model_config: Any) -> None:
    if model_config.quantization:
        raise MisuseError(
            f"vLLM holds this model quantised ({model_config.quantization}), so a patch of the checkpoint has no place "
            "in it; reload whole versions (thinwire follow --exec), or serve it unquantised"
        )


def _swap_of(reports: list[dict[str, Any]], pause_s: float) -> Swap:
    first = reports[0]
    if len({report["digest"] for report in reports}) > 1:
        raise MisuseError("workers hold different versions; open the store again in all of them")
    return Swap(
        first["version"], first["step"], first["digest"], sum(report["elements"] for report in reports),
        sum(report["bytes_fetched"] for report in reports), max(report["prepare_s"] for report in reports),
        max(report["pause_s"] for report in reports), pause_s,
    )  # fmt: skip


def _label(swap: Swap) -> str:
    return f"{swap.version}:{swap.digest}"


def _busy(states: list[dict[str, Any]]) -> bool:
    return any(state["busy"] for state in states)


def _raise_if_failed(states: list[dict[str, Any]]) -> None:
    errors = [state["error"] for state in states if state["error"]]
    if errors:
        raise RetryError(f"{len(errors)} of {len(states)} workers could not prepare the version: {errors[0]}")


class Follower:
    """Keeps an ``LLM`` at a store's newest version, between calls of ``generate``.

    Args:
        llm: made with ``worker_extension_cls="thinwire.integrations.vllm_engine.WorkerExtension"``.
        store: a URL or path that every worker can reach.
        version: begin with this one; the newest by default.
        settings: a consumer's: ``trust`` (files that every worker can read), ``retry_s``, ``threads``, ``cache``, ...

    ``llm.get_weight_version()``, and each output's ``weight_versions``, tell version and digest as ``"7:b3f1..."``.

    Raises:
        MisuseError: the model is quantised, or of another kind than the versions.
        RetryError: (prepare, swap) workers could not get the version; the one served stays.
    """

    def __init__(self, llm: Any, store: str, *, version: int | None = None, **settings: Any) -> None:
        self.llm = llm
        self._watch = Newest(store, settings)
        newest = self._watch() if version is None else version
        began = time.perf_counter()
        reports = llm.collective_rpc("thinwire_open", args=(store, newest, dict(settings)))
        self.at = _swap_of(reports, time.perf_counter() - began)
        self._target: int | None = None
        self._mark()

    def prepare(self) -> int | None:
        """Let the workers begin with the newest version; its number, or None if none is newer. Returns at once."""
        newest = self._watch()
        if newest > max(self.at.version, self._target or 0):
            self.llm.collective_rpc("thinwire_prepare", args=(newest,))
            self._target = newest
        return self._target

    def swap(self) -> Swap | None:
        """Go to the version that was prepared, once all workers are ready; None without one. Not while generating."""
        if self._target is None:
            return None
        while _busy(states := self.llm.collective_rpc("thinwire_ready")):
            time.sleep(_READY_POLL_S)
        target, self._target = self._target, None
        _raise_if_failed(states)
        began = time.perf_counter()
        reports = self.llm.collective_rpc("thinwire_swap", args=(target,))
        self.llm.reset_prefix_cache()
        self.at = _swap_of(reports, time.perf_counter() - began)
        self._mark()
        return self.at

    def poll(self) -> Swap | None:
        """Prepare and swap, if there is a newer version."""
        self.prepare()
        return self.swap()

    def verify(self) -> None:
        """Compare what the workers hold with the version, bit by bit.

        Raises:
            DamagedObjectError: (by the worker) tensors differ.
        """
        self.llm.collective_rpc("thinwire_verify")

    def _mark(self) -> None:
        self.llm.update_weight_version(_label(self.at))


async def follow(
    engine: Any,
    store: str,
    *,
    every_s: float = 0.5,
    requests: Literal["keep", "wait", "abort"] = "wait",
    version: int | None = None,
    **settings: Any,
) -> AsyncIterator[Swap]:
    """Keep an ``AsyncLLM`` at a store's newest version; yields each swap, the first load among them.

    ``requests`` says what becomes of those under way when the engine pauses: they end first (``wait``), go on with the
    new weights and the old cache (``keep``), or end at once (``abort``). Other arguments as for :class:`Follower`.
    """
    watch = Newest(store, settings)
    at = version or await asyncio.to_thread(watch)
    swap: Swap | None = None
    while True:
        if swap is not None:
            at = await _next(engine, watch, swap.version, every_s)
        paused = time.perf_counter()
        await engine.pause_generation(mode=requests, clear_cache=False)
        stood = time.perf_counter()
        try:
            args: tuple[Any, ...] = (at,) if swap is not None else (store, at, dict(settings))
            method = "thinwire_swap" if swap is not None else "thinwire_open"
            reports = await engine.collective_rpc(method, args=args)
            await engine.reset_prefix_cache()
            swap = _swap_of(reports, 0.0)
            await engine.update_weight_version(_label(swap))
        finally:
            await engine.resume_generation()
        pause_s = time.perf_counter() - (paused if requests == "keep" else stood)
        swap = Swap(**{**asdict(swap), "pause_s": pause_s})
        yield swap


async def _next(engine: Any, watch: Newest, held: int, every_s: float) -> int:
    """The next version that all workers are ready for. A store that does not answer is waited out."""
    while True:
        newest = held
        with suppress(RetryError, ObjectNotFoundError):
            newest = await asyncio.to_thread(watch)
        if newest > held:
            await engine.collective_rpc("thinwire_prepare", args=(newest,))
            while _busy(states := await engine.collective_rpc("thinwire_ready")):
                await asyncio.sleep(_READY_POLL_S)
            with suppress(RetryError):
                _raise_if_failed(states)
                return newest
        await asyncio.sleep(every_s)


def keep_cpu_weights() -> None:
    """Let vLLM on a CPU compute with plain weights instead of packing them away, so that they can be updated.

    To be called before a model is loaded, in each worker's process. Costs speed: only for tests and trials.
    """
    import torch
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        del remove_weight
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain


def register() -> None:
    """vLLM's plugin entry point: registers the weight-transfer backend ``thinwire``, in every one of its processes.

    With ``THINWIRE_VLLM_CPU=1`` in the environment also :func:`keep_cpu_weights`.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if os.environ.get("THINWIRE_VLLM_CPU") == "1":
        keep_cpu_weights()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, _transfer_engine())


def _transfer_engine() -> Any:
    """The class, made here because its base is vLLM's."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )

    @dataclass
    class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
        store: str
        version: int | None = None
        settings: dict[str, Any] | None = None

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
        version: int | None = None

    class ThinwireWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc]
        """Pulls versions from a store. All is prepared within ``update_weights``; :class:`Follower` does it before."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo
        supports_draft_weight_update = False
        worker: WorkerSync | None = None

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            _refuse_quantised(self.model_config)
            self.worker = WorkerSync(self.model, init_info.store, init_info.settings or {})
            self.worker.open(init_info.version)

        def start_weight_update(self) -> None:
            if self.worker is None:
                raise MisuseError("no store is open; call init_weight_transfer_engine with its URL first")

        def receive_weights(self, update_info: UpdateInfo) -> None:
            assert self.worker is not None
            version = self.worker.sync.newest() if update_info.version is None else update_info.version
            self.worker.swap(version)

        def finish_weight_update(self) -> None:
            """Nothing is left to do: everything was written in place."""

        def shutdown(self) -> None:
            self.worker = None

        @staticmethod
        def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
            del iterator, trainer_args
            raise MisuseError("the trainer publishes to the store (thinwire.Publisher); workers pull from there")

    return ThinwireWeightTransferEngine

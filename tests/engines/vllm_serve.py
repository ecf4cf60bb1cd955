"""Run by test_vllm in a process of its own: vLLM serves SmolLM2 while versions are published; prints JSON, a line each.

``fresh FOLDER``: load a checkpoint as vLLM does. ``follow``: an LLM follows between calls of generate. ``backend``: the
same through vLLM's own weight-transfer calls. ``parts``: as ``follow``, of versions that two ranks publish in parts.
``live``: an AsyncLLM follows while requests come in.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["THINWIRE_VLLM_CPU"] = "1"

VERSIONS = 4
PROMPTS = ["The capital of France is", "Two plus three is", "Once upon a time", "def add(a, b):"]
TOKENS = 12
EXTENSION = "thinwire.integrations.vllm_engine.WorkerExtension"


def say(**facts: Any) -> None:
    print("RESULT " + json.dumps(facts), flush=True)


def settings(**more: Any) -> dict[str, Any]:
    return {
        "dtype": "bfloat16", "max_model_len": 128, "enforce_eager": True, "max_num_seqs": 1, "seed": 0,
        "disable_log_stats": True, **more,
    }  # fmt: skip


def sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=TOKENS)


def params_digest(worker: Any) -> str:
    """Digest of all parameters that a worker holds, fused as they are."""
    import blake3
    import torch

    total = blake3.blake3()
    for name, tensor in sorted(worker.model_runner.get_model().named_parameters()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def held(llm: Any) -> str:
    return params_digest(llm.llm_engine.model_executor.driver_worker.worker)


def answers(llm: Any) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, sampling(), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def smollm2() -> Path:
    from thinwire.lab.smollm2 import smollm2_folder

    return smollm2_folder()


class Trainer:
    """Publishes versions of SmolLM2, each with 1 % of all weights moved, and keeps them as checkpoints."""

    def __init__(self, store: str, out: Path, *, parts: bool = False) -> None:
        import torch
        from safetensors.torch import load_file

        import thinwire

        self.out, self.weights = out, load_file(smollm2() / "model.safetensors")
        self.publisher = InParts(store) if parts else thinwire.Publisher(store)
        self.generator = torch.Generator().manual_seed(0)
        self.version = 0

    def publish(self) -> Any:
        import torch
        from safetensors.torch import save_file

        if self.version:
            for tensor in self.weights.values():
                tensor[torch.rand(tensor.shape, generator=self.generator) < 0.01] *= 1.3
        self.version += 1
        folder = self.out / str(self.version)
        folder.mkdir()
        for path in smollm2().iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, folder)
        save_file(self.weights, folder / "model.safetensors", metadata={"format": "pt"})
        return self.publisher.publish(self.weights, step=self.version)


class InParts:
    """A publisher of two ranks, in threads, each with half of the rows of every tensor."""

    def __init__(self, store: str) -> None:
        import thinwire
        from tests.sharded.threads import ranks

        self.publishers = [thinwire.ShardedPublisher(store, group=rank, threads=1) for rank in ranks(2)]

    def publish(self, weights: dict[str, Any], *, step: int) -> Any:
        from functools import partial

        from tests.sharded.threads import together
        from thinwire.sync.shards import Slice

        halves: list[dict[str, Slice]] = [{}, {}]
        for name, tensor in weights.items():
            shape, at = tuple(tensor.shape), tensor.shape[0] // 2
            for half, rows, start in ((halves[0], tensor[:at], 0), (halves[1], tensor[at:], at)):
                half[name] = Slice(rows, (start, *(0 for _ in shape[1:])), shape)
        return together([
            partial(publisher.publish, half, step=step) for publisher, half in zip(self.publishers, halves, strict=True)
        ])[0]  # fmt: skip


def fresh(folder: str) -> None:
    from vllm import LLM

    llm = LLM(folder, **settings())
    say(tokens=answers(llm), params=held(llm))


def offline(store: str, out: Path, *, backend: bool, parts: bool) -> None:
    from vllm import LLM

    more: dict[str, Any] = (
        {"weight_transfer_config": {"backend": "thinwire"}} if backend else {"worker_extension_cls": EXTENSION}
    )
    llm = LLM(str(smollm2()), **settings(load_format="dummy", **more))
    from thinwire.integrations.vllm_engine import Follower  # vLLM fails to start where Numba is loaded already

    trainer = Trainer(store, out, parts=parts)
    trainer.publish()
    follower = None
    if backend:
        llm.init_weight_transfer_engine({"init_info": {"store": store}})
    else:
        follower = Follower(llm, store)
    for version in range(1, VERSIONS + 1):
        swap: dict[str, Any] = {}
        if version > 1:
            report = trainer.publish()
            if follower is not None:
                follower.prepare()
                before = answers(llm)  # it serves the old version meanwhile
                found = follower.swap()
                assert found is not None
                assert (found.version, found.digest) == (version, report.digest)
                follower.verify()
                swap = {
                    "pause_s": found.pause_s, "prepare_s": found.prepare_s, "elements": found.elements,
                    "bytes": found.bytes_fetched, "before": before,
                }  # fmt: skip
            else:
                llm.start_weight_update()
                llm.update_weights({"update_info": {}})
                llm.finish_weight_update(weight_version=str(version))
                llm.reset_prefix_cache()
        say(version=version, tokens=answers(llm), params=held(llm), label=llm.get_weight_version(), **swap)


async def live(store: str, out: Path, ranks: int) -> None:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = settings(load_format="dummy", worker_extension_cls=EXTENSION, tensor_parallel_size=ranks)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(smollm2()), **arguments))
    from thinwire.integrations.vllm_engine import follow

    trainer = Trainer(store, out)
    trainer.publish()
    swaps: list[Any] = []
    at_last = asyncio.Event()

    async def following() -> None:
        async for swap in follow(engine, store, every_s=0.05):
            swaps.append(swap)
            if swap.version == VERSIONS:
                at_last.set()

    async def ask(number: int) -> dict[str, Any]:
        outputs = [o async for o in engine.generate(PROMPTS[number % len(PROMPTS)], sampling(), f"r{number}")]
        done = outputs[-1].outputs[0]
        return {
            "prompt": number % len(PROMPTS), "tokens": list(done.token_ids),
            "versions": sorted({span.version.partition(":")[0] for span in done.weight_versions}),
        }  # fmt: skip

    def publishing() -> None:
        for _ in range(VERSIONS - 1):
            time.sleep(1.5)
            trainer.publish()

    task = asyncio.create_task(following())
    while not swaps:
        await asyncio.sleep(0.05)
        if task.done():
            await task
    thread = threading.Thread(target=publishing)
    thread.start()
    number, after = 0, 0
    while after < len(PROMPTS):  # requests never stop; some more at the last version
        after += int(at_last.is_set())
        say(answer=await ask(number))
        number += 1
        if task.done():
            await task
    thread.join()
    task.cancel()
    await engine.collective_rpc("thinwire_verify")  # raises unless every rank holds the version, bit for bit
    for swap in swaps:
        say(swap=[swap.version, swap.pause_s, swap.prepare_s, swap.write_s, swap.elements])
    engine.shutdown()


if __name__ == "__main__":
    kind, where = sys.argv[1], Path(sys.argv[2])
    if kind == "fresh":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        fresh(str(where))
    elif kind == "live":
        asyncio.run(live(str(where / "store"), where, int(sys.argv[3])))
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        offline(str(where / "store"), where, backend=kind == "backend", parts=kind == "parts")

"""Switching a model between fine-tunes in place: cells overwritten, LoRA adapters merged, whole copies, arithmetic.

All peers run in this process, in turns, on models of the same weights. The router's digests are verified before
anything is timed, and again at the end.
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import numpy as np
import torch

from thinwire.bench.measure import Stopwatch, Timing, load, machine, versions
from thinwire.errors import MisuseError
from thinwire.integrations.router import SparseTaskRouter
from thinwire.merge.delta import TensorDelta
from thinwire.sync.encode import Options, make_patch, take_snapshot
from thinwire.sync.layout import StateSource
from thinwire.tensors.bits import cells_of, tensor_of
from thinwire.tensors.tree import state_of
from thinwire.wire.patch import Patch

__all__ = ["RATIOS", "SIZES", "SwitchOptions", "run_switch"]

Row = dict[str, Any]
Report = Callable[[str], None]

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512},
    "0.1b": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 32000},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936},
}
"""Shapes of Qwen2 models; 0.5b is Qwen2.5-0.5B's."""

RATIOS = {
    "enter": ("enter", "merge"),
    "leave": ("leave", "unmerge"),
    "task to task": ("task to task", "switch"),
    "enter, than a copy": ("enter", "copy"),
}
"""Each ratio: what of ours, against what of a peer's."""

_TIMED = ("enter", "leave", "task to task", "copy", "merge", "unmerge", "switch")
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class SwitchOptions:
    """What is measured. ``density`` is the share of weights that a fine-tune changes, ``rank`` that of LoRA's peers."""

    size: str = "0.5b"
    density: float = 0.01
    rank: int = 16
    switches: int = 1000
    repeats: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise MisuseError(f"size must be one of {', '.join(SIZES)}, not {self.size!r}")
        if not 0 < self.density <= 1 or min(self.rank, self.repeats) < 1 or self.switches < 0:
            raise MisuseError("density lies above 0 and up to 1; rank and repeats are positive")


def _base_model(options: SwitchOptions) -> torch.nn.Module:
    transformers = import_module("transformers")
    heads = {"num_attention_heads": max(2, SIZES[options.size]["hidden_size"] // 64), "num_key_value_heads": 2}
    config = transformers.Qwen2Config(**SIZES[options.size], **heads, tie_word_embeddings=True)
    with torch.device("meta"):
        model: torch.nn.Module = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(options.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def _expert(model: torch.nn.Module, options: SwitchOptions, seed: int) -> Patch:
    """A patch that moves a share of the weights, at random places, by about a tenth of their spread."""
    snapshot = take_snapshot(StateSource(state_of(model)))
    generator = np.random.default_rng(seed)
    tuned = {}
    for name, tensor in state_of(model).tensors.items():
        count = max(1, round(options.density * tensor.numel()))
        where = torch.from_numpy(np.unique(generator.integers(0, tensor.numel(), count)))
        new = tensor.clone().reshape(-1)
        step = torch.from_numpy(generator.standard_normal(where.numel(), np.float32)) * 0.002
        new[where] = (new[where].float() + step).to(tensor.dtype)
        tuned[name] = new.reshape(tensor.shape)
    aliases = {alias: tuned[name] for alias, name in state_of(model).aliases.items()}
    return make_patch(snapshot, StateSource(state_of({**tuned, **aliases})), Options("fast"))


def _peft_model(model: torch.nn.Module, options: SwitchOptions) -> Any:
    """A copy of the model with two LoRA adapters on all its linear layers, with random contents."""
    peft = import_module("peft")
    config = peft.LoraConfig(r=options.rank, target_modules=_TARGETS)
    found = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="first")
    found.add_adapter("second", config)
    generator = torch.Generator().manual_seed(options.seed)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return found


def _verify(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _wrong(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """Share of the weights that differ in bits."""
    differ = sum(int((cells_of(before[n]) != cells_of(after[n])).sum()) for n in before)
    return differ / sum(tensor.numel() for tensor in before.values())


def _arithmetic(deltas: list[TensorDelta]) -> Row:
    """What is left of the touched weights after adding bfloat16 differences and subtracting them again."""
    touched = reached = wrong = 0
    for delta in deltas:
        base, new = (tensor_of(c.copy(), delta.dtype, (c.size,)) for c in (delta.base, delta.new))
        difference = new - base
        there = base + difference
        back = there - difference
        touched += delta.changed
        reached += int((cells_of(there) != delta.new).sum())
        wrong += int((cells_of(back) != delta.base).sum())
    return {"touched": touched, "task_wrong_share": reached / touched, "base_wrong_share": wrong / touched}


def _random_switches(router: SparseTaskRouter, base: str, options: SwitchOptions, report: Report) -> int:
    """Random switches; the digest of the base after each return (of every hundredth on a large model)."""
    choose, checked = random.Random(options.seed), 0
    every = 1 if options.size == "tiny" else 100
    for i in range(options.switches):
        with router.task(*choose.sample(sorted(router.tasks), k=choose.randint(1, 2))):
            pass
        if (i + 1) % every == 0:
            report(f"switch {i + 1} of {options.switches}")
            _verify(router.digest() == base, f"the base's digest differs after {i + 1} switches")
            checked += 1
    return checked


class _Lora:
    """A copy of the model with two LoRA adapters, which are merged into it and taken out again."""

    def __init__(self, model: torch.nn.Module, options: SwitchOptions) -> None:
        self.model = _peft_model(model, options)
        named = dict(self.model.named_parameters())
        self._layers = {n: p.detach() for n, p in named.items() if "base_layer" in n and n.endswith("weight")}
        self._kept = {name: tensor.clone() for name, tensor in self._layers.items()}
        self.size = sum(p.nbytes for n, p in named.items() if "lora_" in n and ".first." in n)
        self.merges, self.wrong_after_one = 0, 0.0

    @property
    def weights(self) -> int:
        """Weights of the layers that have adapters."""
        return sum(tensor.numel() for tensor in self._kept.values())

    def wrong(self) -> float:
        """Share of these that differ from the base."""
        return _wrong(self._kept, self._layers)

    def merge(self, name: str) -> None:
        self.model.merge_adapter([name])
        self.merges += 1

    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        if self.merges == 1:
            self.wrong_after_one = self.wrong()


def _timed(
    model: torch.nn.Module, router: SparseTaskRouter, lora: _Lora, options: SwitchOptions, report: Report
) -> dict[str, Timing]:
    """Seconds of each switch, in turns; a first round warms up."""
    tensors = list(state_of(model).tensors.values())
    whole = [tensor.clone() for tensor in tensors]
    with router.task("first"):
        dense = [tensor.clone() for tensor in tensors]
    lora.merge("first")
    lora.unmerge()  # looks at the bits
    watches = {}
    for round_ in range(options.repeats + 1):
        report(f"round {round_} of {options.repeats}")
        if round_ <= 1:
            watches = {name: Stopwatch() for name in _TIMED}
        with watches["enter"]():
            router.set_adapter("first")
        with watches["task to task"]():
            router.set_adapter("second")
        with watches["leave"]():
            router.set_adapter(None)
        with watches["copy"](), torch.no_grad():
            for tensor, source in zip(tensors, dense, strict=True):
                tensor.copy_(source)
        with torch.no_grad():
            for tensor, source in zip(tensors, whole, strict=True):
                tensor.copy_(source)
        with watches["merge"]():
            lora.merge("first")
        with watches["unmerge"]():
            lora.unmerge()
        lora.merge("first")
        with watches["switch"]():
            lora.unmerge()
            lora.merge("second")
        lora.unmerge()
    return {name: watch.timing() for name, watch in watches.items()}


def _loaded(model: torch.nn.Module, options: SwitchOptions, report: Report) -> tuple[SparseTaskRouter, Row]:
    router, loading, sizes = SparseTaskRouter(model), Stopwatch(), []
    for seed, name in enumerate(("first", "second"), start=1):
        report(f"making and loading task {name}")
        patch = _expert(model, options, options.seed + seed)
        sizes.append(sum(len(part) for part in patch.encode()))
        with loading():
            router.load_adapter(patch, name)
    changed = router.tasks["first"].changed
    facts = {
        "changed": changed,
        "patch_bytes": sizes[0],
        "bytes_per_changed": round(sizes[0] / changed, 3),
        "task_memory_bytes": router.tasks["first"].size,
        "load_s": round(min(loading.timing().runs), 4),
    }
    return router, facts


def run_switch(options: SwitchOptions, *, report: Report = lambda _: None) -> list[Row]:
    """One row: best and median seconds of each kind of switch, and what became of the base's bits.

    Raises:
        MisuseError: Transformers or PEFT is not installed.
        AssertionError: a digest differs: then nothing is timed.
    """
    try:
        import_module("transformers"), import_module("peft")
    except ImportError as error:
        raise MisuseError(f"{error.name} is not installed; pip install transformers peft") from error
    report("making the base")
    before = load()
    model = _base_model(options)
    weights = sum(tensor.numel() for tensor in state_of(model).tensors.values())
    router, facts = _loaded(model, options, report)
    base = router.digest()
    for name, task in router.tasks.items():
        with router.task(name):
            _verify(router.digest() == task.result, f"{name} is not what its patch promises")
        _verify(router.digest() == base, "the base differs after a task")
    report("adding LoRA adapters to a copy")
    lora = _Lora(model, options)
    timings = _timed(model, router, lora, options, report)
    best = {name: timing.best for name, timing in timings.items()}
    row = {
        "bench": "switch",
        "size": options.size,
        "weights": weights,
        "density": options.density,
        **facts,
        "runs": options.repeats,
        "best_s": {name: round(value, 5) for name, value in best.items()},
        "median_s": {name: round(timing.median, 5) for name, timing in timings.items()},
        "times_faster": {name: round(best[theirs] / best[ours], 2) for name, (ours, theirs) in RATIOS.items()},
        "lora": {
            "rank": options.rank,
            "weights": lora.weights,
            "bytes": lora.size,
            "merges": lora.merges,
            "wrong_share_after_one": round(lora.wrong_after_one, 6),
            "wrong_share_at_end": round(lora.wrong(), 6),
        },
        "arithmetic": {k: round(v, 6) for k, v in _arithmetic(list(router.tasks["first"].deltas.values())).items()},
        "switches": options.switches,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": {**versions(), **{name: metadata.version(name) for name in ("peft", "transformers")}},
    }
    del lora
    gc.collect()
    row["digests_equal"] = _random_switches(router, base, options, report)
    return [{**row, "load_before": before, "load_after": load()}]

"""The hook for SGLang's weight loaders, in a stand-in that calls it as SGLang 0.5.23 does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thinwire
from tests.integrations.chains import CHAINS
from tests.integrations.engines import Engine, checkpoint
from tests.integrations.test_runtime import bits, loaded, stepped
from thinwire.errors import MalformedError, RetryError
from thinwire.integrations import sglang_loader

pytestmark = pytest.mark.usefixtures("one_thread")


class Sglang:
    """``update_weights_from_tensor`` as SGLang has it: the format names a function that gets the model and tensors."""

    def __init__(self) -> None:
        self.model, self.flushed = Engine(), 0

    def update_weights_from_tensor(
        self, named_tensors: list[tuple[str, Tensor]], load_format: str | None = None, flush_cache: bool = True
    ) -> None:
        assert load_format == sglang_loader.HOOK
        module, _, name = load_format.rpartition(".")
        sent = [(key, tensor.clone()) for key, tensor in named_tensors]  # it crosses processes
        getattr(importlib.import_module(module), name)(self.model, sent)
        self.flushed += flush_cache


@pytest.mark.parametrize("kind", CHAINS)
def test_it_follows_a_chain_as_if_it_had_loaded_each_version(tmp_path: Path, kind: str) -> None:
    store, weights = str(tmp_path / "store"), checkpoint(0)
    publisher = CHAINS[kind](store, anchor_ratio=100)
    publisher.publish(weights, step=7)
    engine = Sglang()
    follower = sglang_loader.Follower(engine, store, reports=tmp_path)
    assert (follower.at["version"], follower.at["step"]) == (1, 7)
    assert bits(engine.model) == bits(loaded(weights, 0, 1))
    assert follower.prepare() is None
    assert follower.swap() is None
    for version in (2, 3):
        stepped(weights, version)
        report = publisher.publish(weights)
        before = bits(engine.model)
        assert follower.prepare() == version
        assert bits(engine.model) == before
        swapped = follower.swap()
        assert swapped is not None
        assert (swapped["version"], swapped["digest"]) == (version, report.digest)
        assert bits(engine.model) == bits(loaded(weights, 0, 1))
        follower.verify()
    assert engine.flushed == 2  # old weights' cache, once a swap
    engine.model.tensors["layers.0.norm.weight"].data[0] += 1
    with pytest.raises(RetryError, match="DamagedObjectError"):
        follower.verify()


@pytest.mark.parametrize("kind", CHAINS)
def test_what_goes_wrong_in_a_rank_is_told_and_does_not_end_it(tmp_path: Path, kind: str) -> None:
    store, weights = str(tmp_path / "store"), checkpoint(0)
    publisher = CHAINS[kind](store, anchor_ratio=100)
    publisher.publish(weights)
    engine: Any = Sglang()
    follower = sglang_loader.Follower(engine, store, retry_s=0.0)
    stepped(weights, 1)
    publisher.publish(weights)
    held = bits(engine.model)
    moved = list((tmp_path / "store" / "objects").rglob("*.safetensors"))
    for path in moved:
        path.rename(f"{path}.away")
    assert follower.prepare() == 2
    with pytest.raises(RetryError, match="NoPathError"):
        follower.swap()
    assert bits(engine.model) == held
    for path in moved:
        Path(f"{path}.away").rename(path)
    assert follower.prepare() == 2  # once it is mended
    assert follower.swap()["version"] == 2  # type: ignore[index]
    assert bits(engine.model) == bits(loaded(weights, 0, 1))


def test_other_messages_and_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="not tensors"):
        sglang_loader.load(Engine(), [("model.norm.weight", torch.ones(3))])
    engine: Any = Sglang()
    thinwire.Publisher(str(tmp_path / "s")).publish(checkpoint(0))
    follower = sglang_loader.Follower(engine, str(tmp_path / "s"))
    with pytest.raises(RetryError, match="does not know"):
        follower._ask(do="dance")
    engine.model = Engine()
    with pytest.raises(RetryError, match="no store is open"):
        follower.verify()
    with pytest.raises(RetryError, match="rank 1 of 2 has not answered"):
        sglang_loader.Follower(engine, str(tmp_path / "s"), ranks=2)

"""The generation server on what ranks publish in parts: it sees by itself what the store holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integrations.chains import Parts
from tests.integrations.tiny_model import greedy, model_of, save_folder
from thinwire.errors import MisuseError
from thinwire.integrations.generation import Generator, Request
from thinwire.integrations.served import load_served
from thinwire.stores.memory import MemoryStore

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_version_answers_as_a_fresh_model_does(folder: Path, dtype: torch.dtype) -> None:
    store, models = MemoryStore(), {version: model_of(version).to(dtype) for version in (1, 2, 3)}
    trainer = Parts(store, 2, anchor_ratio=100)
    trainer.publish(models[1].state_dict(), step=10)
    served = load_served(folder, store)
    assert {tensor.dtype for tensor in served.tensors.values()} == {dtype}
    generator = Generator(served, store, poll_s=0.02, retry_s=0.1)
    generator.start()
    try:
        for version in (1, 2, 3):
            digest = None
            if version > 1:
                digest = trainer.publish(models[version].state_dict(), step=version * 10).digest
            request = Request(((5, 6, 7),), tokens_max=6, temperature=0.0, min_version=version)
            job = generator.submit(request, timeout_s=120)
            assert job.wait(120)
            answer = job.result()
            assert (answer.version, answer.step) == (version, version * 10)
            assert digest in (None, answer.digest)
            assert answer.choices[0].tokens == greedy(models[version], [5, 6, 7], 6)
        generator.sync.verify()
    finally:
        generator.close()


def test_another_model_than_the_published_one_is_refused(folder: Path) -> None:
    store = MemoryStore()
    Parts(store, 2).publish({"weight": torch.ones(4, 3), "more": torch.zeros(2)})
    with pytest.raises(MisuseError, match="not of the published kind"):
        load_served(folder, store)

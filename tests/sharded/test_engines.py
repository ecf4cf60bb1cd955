"""FSDP2 over processes trains and publishes; engines, and a file, follow bit for bit while it does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cli.tools import thinwire
from tests.integrations.engines import Engine
from tests.integrations.pool import RankPool
from tests.integrations.test_runtime import bits, loaded
from tests.sharded import decoder
from tests.sync.checkpoints import load, same
from thinwire.integrations.runtime_sync import RuntimeSync

VERSIONS, WAIT_S = 5, 400.0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("one_thread")
def test_engines_and_files_follow_two_ranks_of_fsdp(tmp_path: Path, ranks: RankPool) -> None:
    (tmp_path / "store").mkdir()
    store = str(tmp_path / "store")
    engines = {place: Engine(rank=place[0], ranks=place[1]) for place in ((0, 1), (0, 2), (1, 2))}
    followers = {place: RuntimeSync(store, e.tensors, e.load_weights, threads=1) for place, e in engines.items()}
    with ThreadPoolExecutor(1) as pool:
        trainers = pool.submit(ranks.run, 2, decoder.publish_in_step, str(tmp_path), VERSIONS, WAIT_S, timeout_s=WAIT_S)
        for version in range(1, VERSIONS + 1):
            for place, sync in followers.items():
                if version == 1:
                    sync.open(timeout_s=WAIT_S)
                else:
                    while sync.prepare() is None:
                        assert not trainers.done(), trainers.result()
                    swapped = sync.swap()
                    assert swapped is not None
                    assert (swapped.version, swapped.step) == (version, version)
                    assert swapped.elements > 0
                full = torch.load(tmp_path / f"full-{version}.pt")
                assert bits(engines[place]) == bits(loaded(full, *place))
                sync.verify()
            update = thinwire("pull", store, "-o", tmp_path / "m", "--json").json
            assert (update["version"], update["path"]) == (version, "delta" if version > 1 else "anchor")
            held = load(tmp_path / "m" / "model.safetensors")
            assert same(held, {name: full[name] for name in held})
            (tmp_path / f"had-{version}").touch()
        assert [answer["kinds"] for answer in trainers.result()] == [["anchor"] + ["delta"] * (VERSIONS - 1)] * 2

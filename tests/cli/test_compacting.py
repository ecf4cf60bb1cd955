"""``thinwire compact``, and what the other commands make of skip deltas."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.tools import series, thinwire
from tests.sync.checkpoints import load, same
from thinwire.stores.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> tuple[str, list[object]]:
    files, states = series(tmp_path / "steps", 9)
    url = str(tmp_path / "store")
    for file in files:
        thinwire("publish", url, file, "--anchor-ratio", "1000")
    return url, list(states)


def test_a_folder_that_is_behind_is_brought_on_by_skip_deltas(store: tuple[str, list[object]], tmp_path: Path) -> None:
    url, states = store
    thinwire("pull", url, "-o", tmp_path / "model", "--version", 2)
    thinwire("pull", url, "-o", tmp_path / "plain", "--version", 2)
    plain = thinwire("pull", url, "-o", tmp_path / "plain", "--json").json
    dry = thinwire("compact", url, "--dry-run", "--json").json
    assert [(r["base"], r["version"]) for r in dry["written"]] == [(2, 4), (4, 6), (6, 8), (4, 8)]
    assert dry["dry_run"]
    result = thinwire("compact", url)
    assert "wrote 4 skip deltas" in result.out
    assert "0 were there" in result.out
    assert "wrote 0 skip deltas" in thinwire("compact", url).out
    update = thinwire("pull", url, "-o", tmp_path / "model", "--json").json
    assert (update["path"], update["hops"], plain["hops"]) == ("delta", 3, 7)
    assert update["bytes_fetched"] < plain["bytes_fetched"]
    assert same(load(tmp_path / "model" / "model.safetensors"), states[-1])  # type: ignore[arg-type]
    assert "all is well" in thinwire("verify", url, "--deep").out


def test_a_folder_goes_another_way_when_a_skip_delta_is_damaged(
    store: tuple[str, list[object]], tmp_path: Path
) -> None:
    url, states = store
    thinwire("pull", url, "-o", tmp_path / "model", "--version", 4)
    thinwire("compact", url)
    opened = LocalStore(url)
    for info in opened.list("skips/0000000008-0000000004/"):
        opened.put(info.key, [b"\x00" * info.size])
    update = thinwire("pull", url, "-o", tmp_path / "model", "--json").json
    assert (update["version"], update["hops"]) == (9, 3)  # over 6
    assert same(load(tmp_path / "model" / "model.safetensors"), states[-1])  # type: ignore[arg-type]


def test_collecting_and_compacting_go_together(store: tuple[str, list[object]], tmp_path: Path) -> None:
    url, states = store
    thinwire("compact", url)
    report = thinwire("gc", url, "--keep-last", 3, "--grace", "0s", "--json").json
    assert report["kept"] == [7, 8, 9]
    thinwire("pull", url, "-o", tmp_path / "model")
    assert same(load(tmp_path / "model" / "model.safetensors"), states[-1])  # type: ignore[arg-type]
    assert "all is well" in thinwire("verify", url).out


def test_compacting_nothing_is_misuse(tmp_path: Path) -> None:
    assert "no such folder" in thinwire("compact", tmp_path / "nowhere", code=2).err
    (tmp_path / "empty").mkdir()
    assert "no versions" in thinwire("compact", tmp_path / "empty", code=2).err

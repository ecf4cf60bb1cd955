"""Ranks of torch.distributed keep the contract of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integrations.pool import RankPool
from thinwire.compress.group import Group, sizes_of
from thinwire.errors import MisuseError
from thinwire.integrations.process_group import TorchGroup
from thinwire.testing.groups import GroupContract


def on_a_group(work: Callable[[Group], Any], timeout_s: float) -> Any:
    group = TorchGroup(timeout_s=timeout_s)
    dist.barrier()  # a rank that leaves at once would close its connections while others are still making theirs
    return work(group)


class TestTorchGroup(GroupContract):
    patience_s = 20.0

    @pytest.fixture(autouse=True)
    def _pool(self, ranks: RankPool) -> None:
        self.ranks = ranks

    def run(self, size: int, work: Callable[[Group], Any], timeout_s: float = 30.0) -> list[Any]:
        return self.ranks.run(size, on_a_group, work, timeout_s)


def halves() -> list[int]:
    """Two groups side by side, each of two of four ranks."""
    rank = dist.get_rank()
    parents = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = TorchGroup(parents[rank // 2])
    values = torch.tensor([float(rank)])
    group.all_reduce_(values)
    return [group.rank, group.size, *sizes_of(group, rank), int(values)]


def test_a_group_of_some_ranks_numbers_them_from_zero(ranks: RankPool) -> None:
    assert ranks.run(4, halves) == [[0, 2, 0, 1, 1], [1, 2, 0, 1, 1], [0, 2, 2, 3, 5], [1, 2, 2, 3, 5]]


def test_without_a_process_group_it_says_what_to_call() -> None:
    with pytest.raises(MisuseError, match="init_process_group"):
        TorchGroup()

"""Threads as ranks keep the contract of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.compress.ranks import together
from thinwire.compress.group import Group, MemoryGroup
from thinwire.errors import MisuseError
from thinwire.testing.groups import GroupContract


class TestMemoryGroup(GroupContract):
    def run(self, size: int, work: Callable[[Group], Any], timeout_s: float = 30.0) -> list[Any]:
        return together(size, work, timeout_s)


def test_a_group_has_at_least_one_rank() -> None:
    with pytest.raises(MisuseError, match="at least one"):
        MemoryGroup.of(0)

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integrations.pool import RankPool

pytest.register_assert_rewrite("thinwire.testing.groups")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integrations.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool

"""CloudStore keeps the contract on an S3 server."""

from __future__ import annotations

import pytest

from stores.conftest import cloud_store
from thinwire.stores.cloud import CloudStore
from thinwire.testing.stores import StoreContract


class TestContract(StoreContract):
    @pytest.fixture
    def store(self, moto_endpoint: str) -> CloudStore:
        return cloud_store(moto_endpoint, part_bytes=5 << 20)

"""CloudStore against a real S3 server, Ceph's: the contract, the faults, and what only a real server checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.stores.cloud_faults import CloudFaults
from tests.stores.conftest import connect_as
from tests.stores.radosgw import RadosGateway
from thinwire.errors import MisuseError
from thinwire.stores.cloud import CloudStore
from thinwire.testing.stores import StoreContract

pytestmark = pytest.mark.net


@pytest.fixture(scope="module")
def gateway() -> Iterator[RadosGateway]:
    boto3 = pytest.importorskip("boto3")
    with RadosGateway() as gateway:
        client = boto3.client(
            "s3",
            endpoint_url=gateway.endpoint,
            region_name="us-east-1",
            aws_access_key_id=gateway.access_key_id,
            aws_secret_access_key=gateway.secret_access_key,
        )
        client.create_bucket(Bucket="weights")
        yield gateway


@pytest.fixture
def connect(gateway: RadosGateway) -> Callable[..., CloudStore]:
    return connect_as(gateway.access_key_id, gateway.secret_access_key)


class TestContract(StoreContract):
    race_rounds = 20
    large_bytes = 40 << 20

    @pytest.fixture
    def store(self, gateway: RadosGateway, connect: Callable[..., CloudStore]) -> CloudStore:
        return connect(gateway.endpoint, part_bytes=5 << 20)


class TestFaults(CloudFaults):
    @pytest.fixture
    def endpoint(self, gateway: RadosGateway) -> str:
        return gateway.endpoint


@pytest.mark.parametrize(
    "wrong",
    [{"secret_access_key": "wrong"}, {"access_key_id": "nobody"}, {"skip_signature": True}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_credentials(gateway: RadosGateway, connect: Callable[..., CloudStore], wrong: dict[str, object]) -> None:
    right = connect(gateway.endpoint)
    right.put("a", [b"x"])
    store = connect(gateway.endpoint, url=right.url, **wrong)
    for call in (lambda: store.get("a", size_max=1), lambda: store.create("b", [b"x"]), lambda: list(store.list(""))):
        with pytest.raises(MisuseError, match="credentials") as caught:
            call()
        assert gateway.secret_access_key not in str(caught.value)


def test_a_listing_of_more_than_one_page(gateway: RadosGateway, connect: Callable[..., CloudStore]) -> None:
    store = connect(gateway.endpoint)
    keys = [f"{n:05d}" for n in range(1100)]
    for key in keys:
        store.put(key, [])
    assert [info.key for info in store.list("")] == keys

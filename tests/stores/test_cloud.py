"""CloudStore keeps the contract on an S3 server, and its word when network and server do not."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from tests.stores.cloud_faults import CloudFaults
from tests.stores.conftest import connect_as
from thinwire.errors import MisuseError, StoreUnavailableError
from thinwire.stores import open_store
from thinwire.stores.cloud import CREATE_BYTES_MAX, CloudStore
from thinwire.testing.stores import StoreContract


@pytest.fixture
def connect() -> Callable[..., CloudStore]:
    return connect_as("testing", "testing")


class TestContract(StoreContract):
    @pytest.fixture
    def store(self, moto_endpoint: str, connect: Callable[..., CloudStore]) -> CloudStore:
        return connect(moto_endpoint, part_bytes=5 << 20)


class TestFaults(CloudFaults):
    @pytest.fixture
    def endpoint(self, moto_endpoint: str) -> str:
        return moto_endpoint


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_settings_come_from_the_environment(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    store = open_store("s3://weights/environment")
    store.put("a", [b"x"])
    assert store.get("a", size_max=1) == b"x"


def test_a_store_at_the_root_of_a_bucket(moto_endpoint: str, connect: Callable[..., CloudStore]) -> None:
    store = connect(moto_endpoint, url="s3://weights")
    store.put("at-the-root", [b"x"])
    assert "at-the-root" in [info.key for info in store.list("at-")]


def test_foreign_objects_are_not_listed(moto_endpoint: str, connect: Callable[..., CloudStore]) -> None:
    store = connect(moto_endpoint)
    store.put("a", [b"x"])
    store._usual.put("my notes.txt", b"x")
    store._usual.put("ü", b"x")
    assert [info.key for info in store.list("")] == ["a"]


def test_nobody_listens(closed_port: int, connect: Callable[..., CloudStore]) -> None:
    store = connect(f"http://127.0.0.1:{closed_port}", retries=1)
    with pytest.raises(StoreUnavailableError, match="try again"):
        store.get("a", size_max=1)
    with pytest.raises(StoreUnavailableError):
        store.create("a", [b"x"])


def test_no_credentials_anywhere(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    store = open_store("s3://weights", endpoint=f"http://127.0.0.1:{closed_port}", retries=0)
    with pytest.raises(MisuseError, match="AWS_ACCESS_KEY_ID"):
        store.get("a", size_max=1)


def test_an_endpoint_that_is_none(connect: Callable[..., CloudStore]) -> None:
    with pytest.raises(MisuseError, match="endpoint"):
        connect("ftp://127.0.0.1").get("a", size_max=1)


def test_create_has_a_largest_size(connect: Callable[..., CloudStore]) -> None:
    page = memoryview(bytes(1 << 20))
    with pytest.raises(MisuseError, match="put large objects"):
        connect("http://127.0.0.1:9").create("a", [page] * (CREATE_BYTES_MAX // len(page) + 1))


def test_a_credential_provider_is_asked(moto_endpoint: str) -> None:
    asked: list[bool] = []

    def provide() -> dict[str, object]:
        asked.append(True)
        return {"access_key_id": "testing", "secret_access_key": "testing", "token": None, "expires_at": None}

    store = CloudStore("s3://weights/provided", endpoint=moto_endpoint, credential_provider=provide)
    store.put("a", [b"x"])
    assert asked

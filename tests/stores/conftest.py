"""Servers the store tests talk to: started by them, on loopback, and stopped by them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from thinwire.stores.cloud import CloudStore


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """An S3 server with one bucket, ``weights``; every store gets a prefix of its own in it."""
    boto3 = pytest.importorskip("boto3")
    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        client.create_bucket(Bucket="weights")
        yield endpoint
    finally:
        server.stop()


def connect_as(access_key_id: str, secret_access_key: str) -> Callable[..., CloudStore]:
    """A function that opens a store in a fresh prefix of the bucket ``weights`` of a server, or at ``url``."""

    def connect(endpoint: str, *, url: str = "", **options: Any) -> CloudStore:
        defaults: dict[str, Any] = {
            "endpoint": endpoint,
            "region": "us-east-1",
            "access_key_id": access_key_id,
            "secret_access_key": secret_access_key,
            "stall_timeout_s": 20.0,
        }
        return CloudStore(url or f"s3://weights/{uuid.uuid4().hex}/nested", **(defaults | options))

    return connect

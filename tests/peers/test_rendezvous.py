"""The rendezvous, its tickets and hints, and descriptions of swarms: what hostile input does to them is nothing."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MalformedError, MisuseError, RetryError
from thinwire.peers import rendezvous as rendezvous_module
from thinwire.peers.metainfo import (
    PIECE_BYTES_MAX,
    PIECE_BYTES_MIN,
    Description,
    describe,
    description_bytes_max,
    piece_bytes_for,
)
from thinwire.peers.rendezvous import (
    Rendezvous,
    Tickets,
    _Table,
    addresses_of,
    here,
    hint_bytes,
    parse_hint,
    split_address,
)

KEY = "objects/0000000001-ab/delta.safetensors"


@pytest.fixture(scope="module")
def meeting() -> Iterator[Rendezvous]:
    with Rendezvous("127.0.0.1") as made:
        yield made


def ask(meeting: Rendezvous, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", meeting.port, timeout=20)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def announce(meeting: Rendezvous, swarm: str, peer: str, port: int, event: str = "started") -> bytes:
    query = (
        f"/announce?info_hash={swarm * 20}&peer_id={peer * 20}&port={port}&uploaded=0&left=1&event={event}&compact=1"
    )
    status, body = ask(meeting, query)
    assert status == 200
    return body


# --- the tracker's protocol -------------------------------------------------------------------------------------------


def test_peers_of_one_swarm_learn_of_one_another(meeting: Rendezvous) -> None:
    assert announce(meeting, "a", "p", 1001) == b"d8:intervali30e5:peers0:6:peers60:e"
    assert b"6:\x7f\x00\x00\x01\x03\xe9" in announce(meeting, "a", "q", 1002)
    assert b"6:\x7f\x00\x00\x01\x03\xea" in announce(meeting, "a", "p", 1001, "completed")
    assert announce(meeting, "b", "r", 1003).count(b"peers0:") == 1  # another swarm
    announce(meeting, "a", "q", 1002, "stopped")
    assert b"5:peers0:" in announce(meeting, "a", "p", 1001)


@pytest.mark.parametrize(
    "path",
    [
        "/announce",
        "/announce?info_hash=short&peer_id=" + "p" * 20 + "&port=1",
        "/announce?info_hash=" + "a" * 20 + "&peer_id=" + "p" * 20 + "&port=0",
        "/announce?info_hash=" + "a" * 20 + "&peer_id=" + "p" * 20 + "&port=99999",
        "/announce?info_hash=" + "a" * 20 + "&peer_id=" + "p" * 20 + "&port=x",
        "/announce?" + "&" * 5000,
    ],
    ids=["nothing", "short", "port-0", "port-99999", "port-x", "ampersands"],
)
def test_what_is_no_announcement_is_said_to_be_none(meeting: Rendezvous, path: str) -> None:
    status, body = ask(meeting, path)
    assert (status, b"failure reason" in body) == (200, True)


def test_other_paths_and_floods_of_text_do_no_harm(meeting: Rendezvous) -> None:
    assert ask(meeting, "/")[0] == 404
    assert ask(meeting, "/", b"x")[0] == 404
    for body in (
        b"",
        b"[",
        b"[]",
        b"3",
        b'{"key": 3, "holder": "x"}',
        b'{"key": "k", "holder": "h", "ticket": 3}',
        b"[" * 5000,
    ):
        assert ask(meeting, "/tickets", body)[0] in (400, 413)
    assert ask(meeting, "/tickets", b"{}" * (40 << 10))[0] == 413
    with socket.create_connection(("127.0.0.1", meeting.port), timeout=20) as rude:
        rude.sendall(b"\x00" * 100_000)
    assert b"peers" in announce(meeting, "z", "z", 7)


def test_the_table_forgets_the_oldest_and_the_silent() -> None:
    table = _Table()
    for n in range(rendezvous_module.HOLDERS_MAX + 10):
        table.add(b"key", b"%d" % n, n)
    assert len(table.show(b"key", 10**6, but=b"", ttl_s=60)) == rendezvous_module.HOLDERS_MAX
    assert table.show(b"key", 10, but=b"", ttl_s=-1) == []
    for n in range(rendezvous_module.KEYS_MAX + 1):
        table.add(b"k%d" % n, b"h", n)
    assert table.show(b"key", 1, but=b"", ttl_s=60) == []


def test_connections_that_say_nothing_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous_module, "_REQUESTS_MAX", 4)
    monkeypatch.setattr(rendezvous_module._Handler, "timeout", 0.3)
    with Rendezvous("127.0.0.1") as meeting:
        idle = [socket.create_connection(("127.0.0.1", meeting.port), timeout=20) for _ in range(8)]
        deadline = time.monotonic() + 30
        while True:
            with suppress(OSError, http.client.HTTPException):
                if (status := ask(meeting, "/")[0]) != 503:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert status == 404
        for connection in idle:
            connection.close()


# --- tickets ----------------------------------------------------------------------------------------------------------


def test_tickets_are_shown_to_others_until_they_are_taken_back(meeting: Rendezvous) -> None:
    mine, yours = (Tickets(meeting.addresses, holder=name, secret=b"s") for name in ("me", "you"))
    mine.put(KEY, {"address": 7})
    assert mine.get(KEY) == []
    assert [(t["address"], t["holder"]) for t in yours.get(KEY)] == [(7, "me")]
    mine.put(KEY, None)
    assert yours.get(KEY) == []


def test_tickets_without_the_stores_key_are_left_out(meeting: Rendezvous) -> None:
    reader = Tickets(meeting.addresses, holder="reader", secret=b"right")
    Tickets(meeting.addresses, holder="forger", secret=b"wrong").put("objects/x", {"address": 7})
    Tickets(meeting.addresses, holder="moved", secret=b"right").put("objects/y", {"address": 7})
    (good,) = reader.get("objects/y")
    for body in ({**good, "address": 8}, {**good, "code": None}, good):
        ask(meeting, "/tickets", json.dumps({"key": "objects/x", "holder": "h", "ticket": body}).encode())
        assert reader.get("objects/x") == []  # altered, without a code, of another key


def test_a_rendezvous_that_does_not_answer_or_answers_rubbish() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RetryError, match="no rendezvous"):
            Tickets([address], holder="me", timeout_s=0.2).get(KEY)
    with pytest.raises(RetryError):
        Tickets([address], holder="me").get(KEY)
    with pytest.raises(MisuseError, match="ticket"):
        Tickets([address], holder="me").put(KEY, {"x": "y" * 100_000})


# --- hints ------------------------------------------------------------------------------------------------------------


def test_hints_are_what_they_were() -> None:
    found = parse_hint(hint_bytes(["10.0.0.1:80", "[::1]:6969"], b"secret"))
    assert (found.addresses, found.secret) == (["10.0.0.1:80", "[::1]:6969"], b"secret")
    assert all(split_address(f"{address}:1") for address in here())
    assert addresses_of("tracker.example:6969") == ["tracker.example:6969"]


@given(st.binary(max_size=200) | st.from_regex(r'\{"rendezvous": ?.*\}', fullmatch=True).map(str.encode))
def test_no_hint_does_more_than_be_refused(data: bytes) -> None:
    try:
        found = parse_hint(data)
    except MalformedError:
        return
    for address in found.addresses:
        split_address(address)


@pytest.mark.parametrize(
    "value",
    [
        {}, [], {"rendezvous": []}, {"rendezvous": ["a"]}, {"rendezvous": [3]}, {"rendezvous": ["a:1"] * 9},
        {"rendezvous": ["a:1"], "secret": "zz"}, {"rendezvous": ["a:1"], "secret": 3}, {"rendezvous": ["http://a:1/"]},
        {"rendezvous": ["a:70000"]}, {"rendezvous": ["a b:1"]},
    ],
    ids=str,
)  # fmt: skip
def test_hints_that_are_refused(value: Any) -> None:
    with pytest.raises(MalformedError):
        parse_hint(json.dumps(value).encode())


def test_a_port_that_is_taken_is_told() -> None:
    with Rendezvous("127.0.0.1") as taken, pytest.raises(MisuseError, match="no rendezvous can listen"):
        Rendezvous("127.0.0.1", taken.port)


# --- descriptions -----------------------------------------------------------------------------------------------------


@given(data=st.binary(min_size=1, max_size=100_000), cut=st.integers(0, 100_000))
def test_a_description_is_read_back_and_knows_its_object(data: bytes, cut: int) -> None:
    made = describe(KEY, [data[:cut], b"", memoryview(data)[cut:]], piece_bytes=PIECE_BYTES_MIN)
    assert made == describe(KEY, [data], piece_bytes=PIECE_BYTES_MIN)
    encoded = made.encode()
    assert len(encoded) <= description_bytes_max(len(data))
    assert Description.parse(encoded, key=KEY, size_max=len(data)) == made
    assert made.first_wrong(data) is None
    changed = bytearray(data)
    where = cut % len(data)
    changed[where] ^= 1
    assert made.first_wrong(bytes(changed)) == where // PIECE_BYTES_MIN
    assert made.first_wrong(data + b"x") is not None


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_description_that_was_altered_is_refused_or_of_other_pieces(at: int, byte: int) -> None:
    made = describe(KEY, [bytes(100_000)])
    data = bytearray(made.encode())
    data[at % len(data)] = byte
    try:
        found = Description.parse(bytes(data), key=KEY, size_max=100_000)
    except MalformedError:
        return
    assert found.name == made.name
    assert found.size <= 100_000
    assert found.encode() == bytes(data)


@given(st.binary(max_size=300))
def test_noise_is_no_description(data: bytes) -> None:
    with pytest.raises(MalformedError):
        Description.parse(data, key=KEY, size_max=100_000)


def test_a_torrent_of_another_form_is_refused() -> None:
    made = describe(KEY, [bytes(100_000)]).encode()
    tracked = b"d8:announce18:http://evil.test/x" + made[1:]
    with pytest.raises(MalformedError):
        Description.parse(tracked, key=KEY, size_max=100_000)
    with pytest.raises(MalformedError, match="another run"):
        Description.parse(made, key="objects/0000000001-cd/delta.safetensors", size_max=100_000)
    with pytest.raises(MalformedError):
        Description.parse(made, key=KEY, size_max=99_999)
    with pytest.raises(MalformedError):
        Description.parse(made + b"x", key=KEY, size_max=100_000)


def test_pieces_grow_with_the_object() -> None:
    sizes = [piece_bytes_for(1 << n) for n in range(1, 45)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (PIECE_BYTES_MIN, PIECE_BYTES_MAX)


def test_libtorrent_reads_what_we_write() -> None:
    lt = pytest.importorskip("libtorrent")
    made = describe(KEY, [bytes(range(256)) * 1000])
    info = lt.load_torrent_buffer(made.encode()).ti
    assert (info.num_files(), info.total_size(), info.piece_length()) == (1, made.size, made.piece_bytes)
    assert (info.name(), info.priv()) == (made.name, True)
    assert info.hash_for_piece(0) == made.hashes[:20]


def test_the_specification_has_the_descriptions_digests() -> None:
    made = describe("objects/0000000002-0123456789ab/delta.safetensors", [bytes(range(256)) * 200])
    text = (Path(__file__).parents[2] / "docs" / "spec" / "v1.md").read_text()
    assert hashlib.sha256(made.encode()).hexdigest() in text
    assert hashlib.sha1(made.info(), usedforsecurity=False).hexdigest() in text


def test_a_ticket_bears_the_code_that_the_specification_says() -> None:
    with Rendezvous("127.0.0.1") as meeting:
        Tickets(meeting.addresses, holder="a", secret=b"k").put("objects/1/\u00e9", {"engine": "e", "size": 3})
        (found,) = Tickets(meeting.addresses, holder="b", secret=b"k").get("objects/1/\u00e9")
    plain = b'["objects/1/\\u00e9", {"engine": "e", "holder": "a", "size": 3}]'
    assert found["code"] == hmac.new(b"k", b"thinwire ticket v1\n" + plain, hashlib.sha256).hexdigest()

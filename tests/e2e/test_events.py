"""The stream of events over a real socket: connections that drop, a reader that does not read, a drain."""

import signal
import socket
import time
from collections.abc import Iterator

import pytest

from keypast import Client
from tests.e2e.test_server import FAKES, Server


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Server(FAKES, ping_seconds="0.1", event_ring="64", max_event_streams="3") as server:
        yield server.address()


def raw(address: str, head: str) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(f"{head} /v1/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return connection


def test_a_reader_goes_on_where_it_was_cut(address: str) -> None:
    with Client(address) as client:
        feed = client.events()
        for name in "ab":
            client.sessions.create("echo", id=name)
        assert [next(feed).session_id for _ in range(2)] == ["a", "b"]
        feed.close()
        client.sessions.create("echo", id="c").delete()
        with client.events(feed.last_id) as again:
            client.sessions.create("echo", id="d")
            told = [(event.type, event.session_id) for event in (next(again), next(again), next(again))]
    assert told == [("created", "c"), ("deleted", "c"), ("created", "d")]


def test_readers_that_leave_or_do_not_read_hold_up_nobody(address: str) -> None:
    with Client(address) as client:
        for _ in range(6):  # twice as many as may be open at once
            raw(address, "GET").close()
            time.sleep(0.15)  # until a ping finds nobody
        lazy = raw(address, "GET")
        began = time.perf_counter()
        session = client.sessions.create("echo")
        for _ in range(500):  # more than the ring holds, and none of it read
            session.truncate(0)
        assert time.perf_counter() - began < 20
        assert session.version == 500
        with client.events() as feed:
            session.delete()
            assert next(feed).type == "deleted"
        lazy.close()


def test_a_head_request_ends(address: str) -> None:
    for _ in range(5):
        with raw(address, "HEAD") as connection:
            reply = connection.recv(4096)
            assert reply.startswith(b"HTTP/1.1 200")


def test_a_signal_ends_the_stream_and_the_process() -> None:
    with Server(FAKES) as server:
        with Client(server.address()) as client, client.events() as feed:
            session = client.sessions.create("letters")
            server.process.send_signal(signal.SIGTERM)
            assert [event.session_id for event in feed] == [session.id]
        code, printed = server.ends(20)
    assert (code, "Traceback" in printed) == (0, False)

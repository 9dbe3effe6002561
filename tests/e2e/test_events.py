"""The stream of events over a real socket: connections that drop, a reader that does not read, a drain."""

import signal
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from keypast import Client, Retries, errors
from tests.e2e.test_server import FAKES, Server


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Server(FAKES, ping_seconds="0.1", event_ring="64", max_event_streams="3") as server:
        yield server.address()


def raw(address: str, head: str, room: int | None = None) -> socket.socket:
    """A connection that has asked for events. `room`: bytes that it takes unread."""
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.settimeout(20)
    if room is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connection.connect((host, int(port)))
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


@pytest.mark.slow
def test_a_reader_who_takes_nothing_is_let_go() -> None:
    """Its place is free for another, once what is on the way to it is more than the connection holds."""
    with Server("tests.e2e.quick_service", stall_seconds="0.5", max_event_streams="1") as server:
        address = server.address()
        with raw(address, "GET", room=4096) as lazy, Client(address, retries=Retries(limit=0)) as client:
            parent = client.sessions.create("echo")
            assert lazy.recv(12) == b"HTTP/1.1 200"
            with pytest.raises(errors.Refused):
                next(client.events())
            until = time.monotonic() + 60
            while time.monotonic() < until:
                parent.fork(256)  # as many events
                with httpx.stream("GET", f"{address}/v1/events") as another:
                    if another.status_code == 200:
                        break
            assert another.status_code == 200


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

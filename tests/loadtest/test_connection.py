"""HTTP/1.1 as servers speak it: lengths, chunks, closed connections, and what is none of it."""

import socket
from collections.abc import AsyncIterator

import anyio
import pytest

from keypast.loadtest.connection import Address, Connection, Connections, Failed
from tests.loadtest.fake_server import Answer, Asked, FakeServer, always

pytestmark = pytest.mark.anyio


async def joined(chunks: AsyncIterator[bytes]) -> list[bytes]:
    return [chunk async for chunk in chunks]


async def test_a_request_is_what_was_asked() -> None:
    with FakeServer(always(Answer(201, b"made", {"X-Some": "Thing"}))) as server:
        connection = Connection(Address(f"{server.url}/under/"), {"Authorization": "Bearer k"})
        reply = await connection.request("POST", "/v1/it", b"body", {"X-More": "1"})
        await connection.request("GET", "/again")
        await connection.close()
    assert (reply.status, reply.body, reply.headers["x-some"]) == (201, b"made", "Thing")
    first, second = server.asked
    assert (first.method, first.path, first.body) == ("POST", "/under/v1/it", b"body")
    assert (first.headers["authorization"], first.headers["x-more"]) == ("Bearer k", "1")
    assert (second.path, server.connections) == ("/under/again", 1)


async def test_a_chunked_body_comes_as_it_is_sent() -> None:
    with FakeServer(always(Answer(parts=((0, b"one"), (0.05, b"two"))))) as server:
        connection = Connection(Address(server.url))
        head, chunks = await connection.stream("GET", "/")
        assert (head.status, await joined(chunks)) == (200, [b"one", b"two"])
        assert (await connection.request("GET", "/")).body == b"onetwo"
        await connection.close()
    assert server.connections == 1


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.0 200\r\nContent-Length:2\r\nConnection: close\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nok\r\n0\r\nTrailer: t\r\n\r\n", b"ok"),
    ],
)
async def test_other_forms_of_a_reply(raw: bytes, body: bytes) -> None:
    with FakeServer(always(Answer(raw=raw, close=True))) as server:
        connection = Connection(Address(server.url))
        for _ in range(2):
            assert (await connection.request("GET", "/")).body == body
            while connection.usable:  # until the server's end has come
                await anyio.sleep(0.001)
        await connection.close()
    assert server.connections == 2


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "protocol"),
        (b"HTTP/1.1 OK\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "broken"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "broken"),
        (b"", "broken"),
    ],
)
async def test_what_is_no_reply(raw: bytes, kind: str) -> None:
    with FakeServer(always(Answer(raw=raw, close=True))) as server:
        connection = Connection(Address(server.url))
        with pytest.raises(Failed) as caught:
            await connection.request("GET", "/")
        assert (caught.value.kind, connection.usable) == (kind, False)


async def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        connection = Connection(Address(f"http://127.0.0.1:{unused.getsockname()[1]}"))
        with pytest.raises(Failed, match=r"cannot connect to 127\.0\.0\.1") as caught:
            await connection.request("GET", "/")
    assert caught.value.kind == "connect"


async def test_a_stream_that_is_left_closes_its_connection() -> None:
    with FakeServer(always(Answer(parts=((0, b"one"), (5, b"two"))))) as server:
        connection = Connection(Address(server.url))
        _, chunks = await connection.stream("GET", "/")
        assert await anext(chunks) == b"one"
        await chunks.aclose()
        assert not connection.usable


async def test_connections_are_used_again_up_to_a_limit() -> None:
    async def answer(asked: Asked) -> Answer:
        return Answer()

    with FakeServer(answer) as server:
        pool = Connections(Address(server.url), {}, 2)
        one, other = await pool.take(), await pool.take()
        await one.request("GET", "/")
        await other.request("GET", "/")
        pool.give(one)
        pool.give(other)
        assert await pool.take() is other
        pool.give(other)
        await pool.close()
    assert server.connections == 2


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="http:// or https:// and a host"):
        Address(url)

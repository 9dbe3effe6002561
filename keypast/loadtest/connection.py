"""HTTP/1.1 over asyncio's streams: what lies between the load tester and the socket.

httpx costs 0.5 ms of CPU a request, and several ms with 64 tasks on one client; this costs 0.03 ms, so the tester is
not what it measures (docs/loadtest.md has the figures). It knows what a load needs: keep-alive, lengths, chunks, TLS.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple
from urllib.parse import urlsplit

LONGEST_HEAD = 1 << 18  # bytes; also of a chunk's line
MAX_IDLE = 4096  # connections kept


class Failed(Exception):
    """A request that came to nothing. `kind` is what it counts as: connect, broken, protocol, timeout, or what the
    server called it; `retry_after` in seconds, if it said when to come again."""

    def __init__(self, kind: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after


class Head(NamedTuple):
    """`headers` have lower-case names."""

    status: int
    headers: dict[str, str]


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Address:
    """Where to connect, and the path that all others follow."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the address is http:// or https:// and a host, not {url!r}")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.prefix = parts.path.rstrip("/")
        self.name = parts.netloc.rpartition("@")[2]
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None


class Connection:
    """One at a time: a request, or a stream. It opens itself when it is used, again after it failed."""

    def __init__(self, address: Address, headers: Mapping[str, str] | None = None) -> None:
        self._address = address
        self._fixed = f"Host: {address.name}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._reusable = True

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Raises Failed."""
        with self._failing():
            head = await self._send(method, path, body, headers)
            reader = self._reader()
            length = head.headers.get("content-length")
            if method == "HEAD" or head.status in (204, 304):
                content = b""
            elif length is not None:
                content = await reader.readexactly(int(length))
            else:
                content = b"".join([chunk async for chunk in self._chunks(head)])
            await self._end(head)
            return Reply(head.status, head.headers, content)

    async def stream(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[Head, AsyncGenerator[bytes, None]]:
        """The head, and the body as it comes. Both raise Failed. Leaving early: `close`."""
        with self._failing():
            head = await self._send(method, path, body, headers)
        return head, self._read(head)

    async def close(self) -> None:
        if self._streams is not None:
            writer = self._streams[1]
            self._streams = None
            writer.close()
            with suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    @property
    def usable(self) -> bool:
        """Whether it can be used again without a new connection."""
        return self._streams is not None and not (self._streams[0].at_eof() or self._streams[1].is_closing())

    async def _read(self, head: Head) -> AsyncGenerator[bytes, None]:
        with self._failing():
            async for chunk in self._chunks(head):
                yield chunk
            await self._end(head)

    async def _send(self, method: str, path: str, body: bytes, headers: Mapping[str, str] | None) -> Head:
        more = "".join([f"{name}: {value}\r\n" for name, value in headers.items()]) if headers else ""
        length = f"Content-Length: {len(body)}\r\n" if body or method != "GET" else ""
        head = f"{method} {self._address.prefix}{path} HTTP/1.1\r\n{self._fixed}{more}{length}\r\n"
        reader, writer = await self._open()
        writer.write(head.encode("latin-1") + body)
        if len(body) > 1 << 16:
            await writer.drain()
        while True:
            status, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
            version, code = status[:9], status[9:12]
            if version not in ("HTTP/1.1 ", "HTTP/1.0 ") or not code.isdigit():
                raise Failed("protocol", f"not a reply of HTTP/1.1: {status[:80]!r}")
            if code[0] != "1":
                break
        found = [line.partition(":") for line in lines]
        return Head(int(code), {name.lower(): value.strip() for name, _, value in found})

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not self.usable:
            await self.close()
            address = self._address
            try:
                self._streams = await asyncio.open_connection(
                    address.host, address.port, ssl=address.tls, limit=LONGEST_HEAD
                )
            except OSError as error:
                raise Failed("connect", f"cannot connect to {address.name}: {error.strerror or error}") from None
        assert self._streams is not None
        return self._streams

    def _reader(self) -> asyncio.StreamReader:
        assert self._streams is not None
        return self._streams[0]

    async def _chunks(self, head: Head) -> AsyncGenerator[bytes, None]:
        reader = self._reader()
        if head.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
            while await reader.readuntil(b"\r\n") != b"\r\n":
                pass  # trailers
        elif (length := head.headers.get("content-length")) is not None:
            yield await reader.readexactly(int(length))
        else:
            self._reusable = False
            while piece := await reader.read(1 << 16):
                yield piece

    async def _end(self, head: Head) -> None:
        if not self._reusable or head.headers.get("connection", "").lower() == "close":
            self._reusable = True
            await self.close()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """A connection in the midst of something is of no use to the next request."""
        try:
            yield
        except (OSError, EOFError) as error:  # EOFError: asyncio.IncompleteReadError
            self._drop()
            raise Failed("broken", f"the connection broke: {error or type(error).__name__}") from None
        except (ValueError, asyncio.LimitOverrunError) as error:
            self._drop()
            raise Failed("protocol", f"not a reply of HTTP/1.1: {error}") from None
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Connections:
    """As many as are in use at a time, up to a limit; the one used last is used first."""

    def __init__(self, address: Address, headers: Mapping[str, str], limit: int) -> None:
        self._address = address
        self._headers = headers
        self._idle: list[Connection] = []
        self._free = asyncio.Semaphore(limit)

    async def take(self) -> Connection:
        """Waits while the limit is reached."""
        await self._free.acquire()
        return self._idle.pop() if self._idle else Connection(self._address, self._headers)

    def give(self, connection: Connection) -> None:
        if len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        self._free.release()

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().close()

"""The one client that every server is measured with: asyncio streams, no library between it and the socket."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any


class Connection:
    """Keep-alive HTTP/1.1 to one server; `headers` go with every request."""

    def __init__(self, port: int, headers: Mapping[str, str] | None = None) -> None:
        self.port = port
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """The reply's JSON."""
        length = await self._send(method, path, body)
        assert length is not None, f"{path} does not say how long its reply is"
        reader, _ = await self._open()
        return json.loads(await reader.readexactly(length))

    async def events(self, path: str, body: object) -> AsyncIterator[tuple[float, Any]]:
        """(time of arrival, JSON) of every event of a stream."""
        await self._send("POST", path, body)
        reader, _ = await self._open()
        while line := await reader.readline():
            if line.startswith(b"data: "):
                data = line[6:].strip()
                if data == b"[DONE]":
                    break
                yield time.perf_counter(), json.loads(data)
                if b'"stop":true' in line:
                    break
        await self.close()  # a stream's end is not worth parsing chunks for

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        return self._streams

    async def _send(self, method: str, path: str, body: object) -> int | None:
        """Sends, reads the reply's head; the length of its body, None when it is chunked."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: l\r\nContent-Type: application/json\r\n"
        head += f"{self._headers}Content-Length: {len(data)}\r\n\r\n"
        reader, writer = await self._open()
        writer.write(head.encode() + data)
        lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        if not lines[0].startswith((b"http/1.1 200", b"http/1.1 201")):
            raise RuntimeError(f"{method} {path}: {lines[0]!r} {await reader.read(length or 1000)!r}")
        return length

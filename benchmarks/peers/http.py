"""The one client that every server is measured with: the load tester's connection, nothing else before the socket."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.request import urlopen

from keypast._stream import EventParser
from keypast.loadtest.connection import Address, Failed
from keypast.loadtest.connection import Connection as Raw


class Connection:
    """JSON over keep-alive HTTP/1.1 to one server; `headers` go with every request. Raises RuntimeError for whatever is
    not a success."""

    def __init__(self, port: int, headers: Mapping[str, str] | None = None) -> None:
        self.port = port
        self._raw = Raw(Address(f"http://127.0.0.1:{port}"), {"Content-Type": "application/json", **(headers or {})})

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """The reply's JSON."""
        try:
            reply = await self._raw.request(method, path, _written(body))
        except Failed as error:
            raise RuntimeError(f"{method} {path}: {error}") from None
        if reply.status not in (200, 201):
            raise RuntimeError(f"{method} {path}: {reply.status} {reply.body[:1000]!r}")
        return json.loads(reply.body)

    async def events(self, path: str, body: object) -> AsyncIterator[tuple[float, Any]]:
        """(time of arrival, JSON) of every event of a stream."""
        head, chunks = await self._raw.stream("POST", path, _written(body))
        if head.status != 200:
            raise RuntimeError(f"POST {path}: {head.status}")
        parser = EventParser()
        async for chunk in chunks:
            arrived = time.perf_counter()
            for data in parser.feed(chunk):
                if data != "[DONE]":
                    yield arrived, json.loads(data)

    async def close(self) -> None:
        await self._raw.close()


def _written(body: object) -> bytes:
    return b"" if body is None else json.dumps(body).encode()


def metrics(port: int) -> dict[str, float]:
    """The service's series by name and labels, as they stand."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    series = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in series}
